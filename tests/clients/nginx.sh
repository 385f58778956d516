#!/usr/bin/env bash
# nginx (Debian's package) with deploy/nginx.conf in front of two `nibble serve`: TLS, HTTP/2, streaming that is
# not buffered, a client that leaves, a drain that loses nothing.
#   tests/clients/nginx.sh NIBBLE_BINARY ENGINE_DIR
set -euo pipefail
cd "$(dirname "$0")/../.."
nibble=$1 engine=$2
work=$(mktemp -d)
pids=()
finish() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$work"
}
trap finish EXIT
fail() { echo "FAILED: $1" >&2; exit 1; }
url=https://127.0.0.1:18443

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=localhost \
  -keyout "$work/key.pem" -out "$work/cert.pem" 2>/dev/null
sed -e 's/server 127.0.0.1:8000 max_fails=0;/server 127.0.0.1:18001 max_fails=0; server 127.0.0.1:18002 max_fails=0;/' \
  -e 's/listen 8443/listen 18443/' deploy/nginx.conf > "$work/nginx.conf"
for port in 18001 18002; do
  "$nibble" serve "$engine" --port $port --served-model-name chat --kv-cache-bytes 64MiB --access-log off \
    2> "$work/$port.log" &
  pids+=($!)
done
nginx -p "$work" -c "$work/nginx.conf" -g 'daemon off;' 2> "$work/nginx.log" &
pids+=($!)
for _ in $(seq 100); do
  curl -sf http://127.0.0.1:18001/ready > /dev/null && curl -sf http://127.0.0.1:18002/ready > /dev/null && break
  sleep 0.1
done

body='{"messages":[{"role":"user","content":"What is water?"}],"max_tokens":300,"ignore_eos":true,"stream":true}'
[ "$(curl -sk -o /dev/null -w '%{http_version} %{http_code}' $url/health)" = "2 200" ] || fail "HTTP/2 over TLS"
echo "ok: HTTP/2 over TLS"
curl -skN $url/v1/chat/completions -d "$body" |
  while IFS= read -r line; do if [ -n "$line" ]; then date +%s%N; fi; done > "$work/times"
python3 - "$work/times" <<'PY' || fail "the stream arrives as it is made"
import sys
times = [int(line) for line in open(sys.argv[1])]
spread = (times[-1] - times[0]) / 1e6
distinct = len({t // 1_000_000 for t in times})
print(f"ok: {len(times)} events over {spread:.0f} ms, in {distinct} different milliseconds")
sys.exit(not (len(times) > 200 and distinct > 50))
PY
[ "$(curl -sk -o /dev/null -w '%{http_code}' $url/metrics)" = 403 ] || fail "metrics stay inside"

timeout 0.3 curl -skN $url/v1/chat/completions -d "$body" > /dev/null || true
sleep 0.5
for port in 18001 18002; do
  metrics=$(curl -s http://127.0.0.1:$port/metrics)
  grep -q '^vllm:kv_cache_usage_perc.* 0$' <<< "$metrics" || fail "a client that leaves frees the KV cache"
done
echo "ok: a client that leaves nginx frees the KV cache behind it"

# Drain one replica under load: every stream ends with [DONE], new requests go to the other.
for i in $(seq 12); do
  curl -skN $url/v1/chat/completions -d "$body" > "$work/stream$i" &
  streams[i]=$!
done
sleep 0.3
kill -TERM "${pids[0]}"
sleep 0.1
for i in $(seq 8); do
  [ "$(curl -sk -o /dev/null -w '%{http_code}' $url/v1/chat/completions -d "${body/300/5}")" = 200 ] || fail "a request during the drain"
done
echo "ok: requests during the drain are answered by the other replica"
for i in $(seq 12); do
  wait "${streams[i]}" || fail "stream $i"
  tail -n 2 "$work/stream$i" | grep -q 'data: \[DONE\]' || fail "stream $i was not completed"
done
wait "${pids[0]}" || fail "the drained server's exit status"
grep -q 'every answer was completed' "$work/18001.log" || fail "the drain was not clean"
echo "ok: 12 streams over the drain, all complete"
