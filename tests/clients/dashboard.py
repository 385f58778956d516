#!/usr/bin/env python3
"""Every expression of deploy/grafana-dashboard.json must have an answer in a Prometheus that scrapes a used `nibble serve`.

    prometheus --config.file=deploy/prometheus.yml &      # Debian's package
    tests/clients/dashboard.py http://127.0.0.1:9090 MODEL_NAME
"""
import json
import pathlib
import sys
import urllib.parse
import urllib.request

url, model = sys.argv[1:3]
dashboard = json.loads((pathlib.Path(__file__).parents[2] / "deploy/grafana-dashboard.json").read_text())
empty = []
for panel in dashboard["panels"]:
    for target in panel.get("targets", []):
        query = target["expr"].replace("$model", model).replace("$__rate_interval", "1m")
        reply = json.load(urllib.request.urlopen(f"{url}/api/v1/query?" + urllib.parse.urlencode({"query": query})))
        values = [series["value"][1] for series in reply["data"]["result"]]
        print(f"{panel['title']}: {', '.join(values) or 'nothing'}    {query}")
        if not values:
            empty.append(query)
if empty:
    sys.exit(f"FAILED: {len(empty)} expressions without an answer")
