// SPDX-License-Identifier: Apache-2.0
#include "serve/api_keys.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>

#include "base/error.h"

namespace nibble {

ApiKeys ApiKeys::load(const fs::path& file) {
  const std::string text = read_file(file);
  std::vector<std::string> keys;
  size_t number = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    std::string line = text.substr(at, end - at);
    at = end + 1;
    ++number;
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ')) line.pop_back();
    if (line.empty() || line.front() == '#') continue;
    if (std::any_of(line.begin(), line.end(), [](char c) { return c <= ' ' || c == 0x7f; })) {
      fail(ErrorKind::kInput,
           "{}:{}: a key has a space or a control character in it; write one key a line",
           file.string(), number);
    }
    keys.push_back(std::move(line));
  }
  if (keys.empty()) {
    fail(ErrorKind::kInput,
         "{} holds no key, so nobody could use the server; write one key a line, or leave "
         "--api-key-file out",
         file.string());
  }
  return ApiKeys(keys);
}

ApiKeys::ApiKeys(const std::vector<std::string>& keys) {
  for (const std::string& key : keys) digests_.push_back(digest_of(key));
}

bool ApiKeys::accepts(std::string_view candidate) const {
  const Digest digest = digest_of(candidate);
  int found = 0;
  for (const Digest& known : digests_) {
    found |= CRYPTO_memcmp(known.data(), digest.data(), digest.size()) == 0;
  }
  return found != 0;
}

ApiKeys::Digest ApiKeys::digest_of(std::string_view text) {
  Digest digest;
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
  return digest;
}

}  // namespace nibble
