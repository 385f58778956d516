// The chat page's files: served without a key, under a policy that lets nothing else in.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <tuple>

#include "base/file.h"
#include "serve/server_fixture.h"

namespace nibble {
namespace {

using serve_test::get;
using serve_test::post;
using serve_test::Reply;

class Page : public serve_test::ServerTest {};

TEST_F(Page, FilesAreWhatTheRepositoryHas) {
  serve_test::ServerSetup setup;
  setup.with_model = false;
  setup.api.keys = ApiKeys({"secret"});
  start(std::move(setup));
  const fs::path web = fs::path(NIBBLE_SOURCE_DIR) / "src" / "serve" / "web";
  for (const auto& [path, file, type] : {std::tuple{"/", "index.html", "text/html"},
                                         std::tuple{"/app.js", "app.js", "text/javascript"},
                                         std::tuple{"/style.css", "style.css", "text/css"}}) {
    const Reply reply = get(port(), path);
    EXPECT_EQ(reply.status, 200) << path;
    EXPECT_EQ(reply.body, read_file(web / file)) << path;
    EXPECT_TRUE(reply.headers.at("content-type").starts_with(type)) << path;
    EXPECT_EQ(reply.headers.at("x-content-type-options"), "nosniff");
    const std::string& policy = reply.headers.at("content-security-policy");
    EXPECT_TRUE(policy.starts_with("default-src 'none'; script-src 'self';")) << policy;
    EXPECT_EQ(policy.find("unsafe"), policy.npos);
    const std::string condition = "If-None-Match: " + reply.headers.at("etag") + "\r\n";
    EXPECT_EQ(get(port(), path, condition).status, 304) << path;
    EXPECT_EQ(get(port(), path, "If-None-Match: \"other\"\r\n").status, 200) << path;
    EXPECT_EQ(post(port(), path, "").status, 405) << path;
  }
}

TEST_F(Page, HasNoInlineScriptsOrStyles) {  // the policy would forbid them
  const std::string page =
      read_file(fs::path(NIBBLE_SOURCE_DIR) / "src" / "serve" / "web" / "index.html");
  EXPECT_EQ(page.find(" style="), page.npos);
  EXPECT_EQ(page.find("<script>"), page.npos);
  EXPECT_EQ(page.find("http"), page.npos);
}

TEST_F(Page, CanBeLeftOut) {
  serve_test::ServerSetup setup;
  setup.with_model = false;
  setup.api.web_page = false;
  start(std::move(setup));
  EXPECT_EQ(get(port(), "/").status, 404);
}

}  // namespace
}  // namespace nibble
