// SPDX-License-Identifier: Apache-2.0
#include "quantize/report_html.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

namespace nibble {
namespace {

constexpr const char* kStyle = R"(
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --back: #ffffff; --card: #f6f8fa;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --back: #0d1117;
  --card: #151b23; --c0: #58a6ff; --c1: #ffa657; --c2: #56d364; --c3: #d2a8ff; --c4: #ff7b72; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { margin: .3rem 0 .8rem; color: var(--soft); max-width: 48rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; }
svg { width: 100%; height: auto; background: var(--card); border-radius: 6px; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; }
.wide { overflow-x: auto; } summary { cursor: pointer; color: var(--soft); }
)";

std::string escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      default: out += c;
    }
  }
  return out;
}

std::string plain(const json::value& value) {
  if (value.is_string()) return std::string(std::string_view(value.get_string()));
  if (value.is_bool()) return value.get_bool() ? "on" : "off";
  return dump_json(value);
}

double number(const json::object& object, const char* key) {
  const json::value* value = object.if_contains(key);
  return value != nullptr && value->is_number() ? value->to_number<double>() : 0.0;
}

struct Series {
  std::string name;
  int color = 0;  // --cN
  bool hollow = false;
  std::vector<std::pair<int, double>> points;  // layer, value
};

std::string tick_label(double value) { return fmt::format("{:.4g}", value); }

/// Dots joined by lines over the layers. Every dot says its value when pointed at.
std::string layer_plot(const std::vector<Series>& series, bool log_scale, const char* unit) {
  constexpr double kWidth = 900, kHeight = 280, kLeft = 64, kRight = 130, kTop = 30, kBottom = 40;
  double low = INFINITY, high = -INFINITY;
  int layers = 1;
  for (const Series& s : series) {
    for (const auto& [layer, value] : s.points) {
      if (!std::isfinite(value) || (log_scale && value <= 0)) continue;
      low = std::min(low, value), high = std::max(high, value);
      layers = std::max(layers, layer + 1);
    }
  }
  if (!(low <= high)) return "<p>Nothing to show.</p>";
  std::vector<double> ticks;
  if (log_scale) {
    low = std::log10(low), high = std::log10(high);
    const double pad = std::max(0.05 * (high - low), 0.05);
    low -= pad, high += pad;
    for (int decade = static_cast<int>(std::floor(low)); decade <= std::ceil(high); ++decade) {
      for (const double step : {1.0, 2.0, 5.0}) {
        const double tick = decade + std::log10(step);
        if (tick >= low && tick <= high) ticks.push_back(tick);
      }
    }
    while (ticks.size() > 9) {
      std::vector<double> fewer;
      for (size_t i = 0; i < ticks.size(); i += 3) fewer.push_back(ticks[i]);
      ticks = fewer;
    }
  } else {
    const double pad = std::max(0.06 * (high - low), 1e-9 + 0.02 * std::fabs(high));
    low = low >= 0 ? std::max(0.0, low - pad) : low - pad, high += pad;
    double step = std::pow(10.0, std::floor(std::log10((high - low) / 4)));
    for (const double factor : {2.0, 2.5, 2.0}) {  // 1, 2, 5, 10
      if ((high - low) / step > 8) step *= factor;
    }
    for (double tick = std::ceil(low / step) * step; tick <= high; tick += step) {
      ticks.push_back(tick);
    }
  }
  const auto x = [&](int layer) {
    return kLeft + (kWidth - kLeft - kRight) * (layers == 1 ? 0.5 : double(layer) / (layers - 1));
  };
  const auto y = [&](double value) {
    return kTop + (kHeight - kTop - kBottom) * (1 - (value - low) / (high - low));
  };
  std::string svg = fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\">", kWidth, kHeight);
  for (const double tick : ticks) {
    svg += fmt::format(
        "<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/><text x=\"{}\" "
        "y=\"{:.1f}\" text-anchor=\"end\">{}</text>",
        kLeft, kWidth - kRight, y(tick), y(tick), kLeft - 8, y(tick) + 4,
        tick_label(log_scale ? std::pow(10, tick) : tick));
  }
  for (int layer = 0; layer < layers; layer += std::max(1, (layers + 15) / 16)) {
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>", x(layer),
                       kHeight - 16, layer);
  }
  svg += fmt::format("<text x=\"{}\" y=\"{}\">layer</text><text x=\"8\" y=\"12\">{}</text>",
                     kWidth - kRight + 14, kHeight - 16, escape(unit));
  double legend = kTop + 10;
  for (const Series& s : series) {
    std::string path;
    std::string dots;
    for (const auto& [layer, value] : s.points) {
      if (!std::isfinite(value) || (log_scale && value <= 0)) continue;
      const double px = x(layer), py = y(log_scale ? std::log10(value) : value);
      path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", px, py);
      dots += fmt::format(
          "<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3.5\" fill=\"{}\" stroke=\"var(--c{})\" "
          "stroke-width=\"1.5\"><title>layer {}, {}: {:.5g}</title></circle>",
          px, py, s.hollow ? "var(--card)" : fmt::format("var(--c{})", s.color), s.color, layer,
          escape(s.name), value);
    }
    svg += fmt::format(
        "<path d=\"{}\" fill=\"none\" stroke=\"var(--c{})\" stroke-width=\"{}\"{}/>{}", path,
        s.color, s.hollow ? "1" : "1.7", s.hollow ? " stroke-dasharray=\"3 3\"" : "", dots);
    svg += fmt::format(
        "<circle cx=\"{0}\" cy=\"{1}\" r=\"3.5\" fill=\"{2}\" stroke=\"var(--c{3})\" "
        "stroke-width=\"1.5\"/><text x=\"{4}\" y=\"{5}\">{6}</text>",
        kWidth - kRight + 20, legend, s.hollow ? "var(--card)" : fmt::format("var(--c{})", s.color),
        s.color, kWidth - kRight + 30, legend + 4, escape(s.name));
    legend += 18;
  }
  return svg + "</svg>";
}

std::string bar(const json::object& stages) {
  double total = 0;
  for (const auto& stage : stages) total += stage.value().to_number<double>();
  if (!(total > 0)) return "<p>Not measured.</p>";
  std::string svg = "<svg viewBox=\"0 0 900 64\" role=\"img\">", table = "<table>";
  double x = 16;
  int color = 0;
  for (const auto& stage : stages) {
    const double seconds = stage.value().to_number<double>(), width = 868 * seconds / total;
    svg += fmt::format(
        "<rect x=\"{:.1f}\" y=\"16\" width=\"{:.1f}\" height=\"32\" fill=\"var(--c{})\"><title>{}: "
        "{:.1f} s</title></rect>",
        x, width, color, escape(std::string_view(stage.key())), seconds);
    table += fmt::format(
        "<tr><td><span style=\"color:var(--c{})\">&#9632;</span> {}</td><td class=\"n\">{:.1f} "
        "s</td><td class=\"n\">{:.0f} %</td></tr>",
        color, escape(std::string_view(stage.key())), seconds, 100 * seconds / total);
    x += width;
    color = (color + 1) % 5;
  }
  return svg + "</svg>" + table + "</table>";
}

// "layers.3.qkv" -> 3, "qkv"; "lm_head" is in no layer and in no plot over layers.
std::pair<int, std::string> split_name(std::string_view name) {
  const size_t dot = name.rfind('.');
  if (dot == name.npos) return {0, std::string(name)};
  int layer = 0;
  for (const char c : name.substr(7, dot - 7)) layer = layer * 10 + (c - '0');
  return {layer, std::string(name.substr(dot + 1))};
}

class Page {
 public:
  explicit Page(const json::object& report) : report_(report) {
    const json::value* linears = report.if_contains("linears");
    if (linears == nullptr) return;
    for (const json::value& linear : linears->as_array()) linears_.push_back(&linear.as_object());
  }

  std::string render() {
    const std::string model = text("model");
    out_ = fmt::format(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
        "content=\"width=device-width, initial-scale=1\"><title>{0}: 4-bit quantization</title>"
        "<style>{1}</style></head><body>\n<h1>{0}</h1>\n<p>4-bit quantization by nibble {2}. Error "
        "of a linear: energy of its output's error over that of its output, on the calibration "
        "texts.</p>\n",
        escape(model), kStyle, NIBBLE_VERSION);
    settings();
    quality();
    if (linears_.empty()) {
      out_ +=
          "<h2>Linears</h2><p>Rounding to nearest looks at no activations, so there is nothing "
          "to show for each linear.</p>\n";
    } else {
      errors();
      scales();
      outliers();
    }
    kv();
    out_ += "<h2>Time</h2>\n";
    const json::value* stages = report_.if_contains("stages");
    out_ += stages != nullptr ? bar(stages->as_object()) : "<p>Not measured.</p>";
    calibration();
    table();
    return out_ + "</body></html>\n";
  }

 private:
  std::string text(const char* key) const {
    const json::value* value = report_.if_contains(key);
    return value == nullptr ? std::string() : plain(*value);
  }

  // One series a linear; gate and up become one where they are the same.
  std::vector<Series> series(const char* key, bool hollow = false, const char* suffix = "") const {
    std::vector<Series> all;
    const char* const names[] = {"qkv", "o", "gate", "up", "down"};
    for (size_t i = 0; i < std::size(names); ++i) {
      Series& s = all.emplace_back(Series{names[i], static_cast<int>(i), hollow, {}});
      for (const json::object* linear : linears_) {
        const auto [layer, name] = split_name(std::string_view(linear->at("name").as_string()));
        if (name == names[i]) s.points.emplace_back(layer, number(*linear, key));
      }
    }
    if (all[2].points == all[3].points) {
      all[2].name = "gate, up";
      all.erase(all.begin() + 3);
    }
    for (Series& s : all) s.name += suffix;
    return all;
  }

  void settings() {
    const json::value* list = report_.if_contains("settings");
    if (list == nullptr) return;
    out_ += "<table>";
    for (const auto& member : list->as_object()) {
      out_ += fmt::format("<tr><td>{}</td><td>{}</td></tr>", escape(std::string_view(member.key())),
                          escape(plain(member.value())));
    }
    out_ += "</table>\n";
  }

  void quality() {
    out_ += "<h2>Quality against the unquantized model</h2>\n";
    const json::value* list = report_.if_contains("quality");
    if (list == nullptr || list->as_array().empty()) {
      out_ +=
          "<p>Not measured. <code>nibble quantize --eval FILE</code> measures it here, "
          "<code>nibble eval OUT --against HF_DIR --text FILE</code> at any time.</p>\n";
      return;
    }
    out_ +=
        "<table><tr><th>text</th><th class=\"n\">windows</th><th class=\"n\">perplexity "
        "before</th><th class=\"n\">after</th><th class=\"n\">rise</th><th class=\"n\">KL "
        "divergence</th><th class=\"n\">same top token</th></tr>";
    for (const json::value& value : list->as_array()) {
      const json::object& row = value.as_object();
      const double before = number(row, "perplexity_parent"), after = number(row, "perplexity");
      out_ += fmt::format(
          "<tr><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{:.4f}</td><td class=\"n\">"
          "{:.4f}</td><td class=\"n\">{:+.3f} %</td><td class=\"n\">{:.5f} nats</td><td "
          "class=\"n\">{:.2f} %</td></tr>",
          escape(plain(row.at("text"))), number(row, "windows"), before, after,
          100 * (after / before - 1), number(row, "kl_divergence"),
          100 * number(row, "top1_agreement"));
    }
    out_ += "</table>\n";
  }

  void errors() {
    std::vector<Series> all = series("error_rtn", true, ", nearest");
    for (Series& s : series("error", false, ", now")) all.push_back(std::move(s));
    out_ +=
        "<h2>Error of each linear</h2>\n<p>Hollow: rounding to nearest. Filled: as written. "
        "Log scale, lower is better.</p>\n" +
        layer_plot(all, true, "error energy / output energy") + "\n";
    for (const json::object* linear : linears_) {
      if (plain(linear->at("name")) != "lm_head") continue;
      out_ += fmt::format(
          "<p>lm_head: {:.4f} % of its output's energy (round to nearest: {:.4f} %), alpha {:.1f}, "
          "beta {:.2f}, mean clip {:.3f}.</p>\n",
          100 * number(*linear, "error"), 100 * number(*linear, "error_rtn"),
          number(*linear, "alpha"), number(*linear, "beta"), number(*linear, "mean_clip"));
    }
  }

  void scales() {
    out_ +=
        "<h2>Scales and clips that were chosen</h2>\n<p>s = mean |x|^alpha / mean |w|^beta. "
        "Alpha 0 leaves the channels as they are; a clip below 1 gives up the largest weights "
        "of a group for a finer grid.</p>\n" +
        layer_plot(series("alpha"), false, "alpha") + "<p></p>" +
        layer_plot(series("beta"), false, "beta") + "<p></p>" +
        layer_plot(series("mean_clip"), false, "mean clip ratio") + "\n";
  }

  void outliers() {
    std::vector<Series> ratio = series("input_loudest_channel_mean");
    const std::vector<Series> median = series("input_median_channel");
    for (size_t i = 0; i < ratio.size(); ++i) {
      for (size_t p = 0; p < ratio[i].points.size(); ++p) {
        const double below = median[i].points[p].second;
        ratio[i].points[p].second = below > 0 ? ratio[i].points[p].second / below : 0;
      }
    }
    out_ +=
        "<h2>Outliers of the activations</h2>\n<p>Loudest channel of a linear's input over the "
        "median channel (mean |x|), and the largest |x| of all. Gate and up read the same "
        "input.</p>\n" +
        layer_plot(ratio, true, "loudest / median channel") + "<p></p>" +
        layer_plot(series("input_max_abs"), true, "max |x|") + "\n";
  }

  void kv() {
    out_ += "<h2>Ranges of K and V</h2>\n";
    const json::value* scales = report_.if_contains("kv_scales");
    std::vector<Series> all = {{"K after RoPE", 0, false, {}}, {"V", 1, false, {}}};
    if (scales != nullptr) {
      const char* keys[] = {"k", "v"};
      for (size_t s = 0; s < 2; ++s) {
        int layer = 0;
        for (const json::value& scale : scales->as_object().at(keys[s]).as_array())
          all[s].points.emplace_back(layer++, 127 * scale.to_number<double>());
      }
    }
    if (all[0].points.empty()) {
      out_ += "<p>Not measured (--kv-cache none).</p>\n";
      return;
    }
    out_ +=
        "<p>Largest magnitude on the calibration texts: 127 times the static int8 "
        "scale.</p>\n" +
        layer_plot(all, false, "max magnitude") + "\n";
  }

  void calibration() {
    out_ += "<h2>Calibration texts</h2>\n";
    const json::value* data = report_.if_contains("calibration");
    if (data == nullptr || !data->is_object()) {
      out_ += "<p>None were used.</p>\n";
      return;
    }
    out_ += fmt::format(
        "<p>{} tokens in {} sequences of at most {}, shuffled by seed {}.</p>\n<div "
        "class=\"wide\"><table><tr><th>file</th><th>XXH3</th><th class=\"n\">weight</th><th "
        "class=\"n\">samples used</th><th class=\"n\">in file</th><th class=\"n\">refused</th><th "
        "class=\"n\">tokens</th><th class=\"n\">asked for</th><th class=\"n\">cut off</th></tr>",
        number(data->get_object(), "tokens"), number(data->get_object(), "sequences"),
        number(data->get_object(), "seq_len"), number(data->get_object(), "seed"));
    for (const json::value& value : data->get_object().at("sources").as_array()) {
      const json::object& source = value.as_object();
      out_ += fmt::format("<tr><td>{}</td><td>{}</td>", escape(plain(source.at("file"))),
                          escape(plain(source.at("xxh3"))));
      for (const char* key : {"weight", "samples_used", "samples_in_file", "samples_unusable",
                              "tokens", "tokens_wanted", "tokens_cut"}) {
        out_ += fmt::format("<td class=\"n\">{}</td>", number(source, key));
      }
      out_ += "</tr>";
    }
    out_ += "</table></div>\n";
  }

  void table() {
    if (linears_.empty()) return;
    out_ +=
        "<h2>Every linear</h2>\n<details><summary>table</summary><div class=\"wide\"><table>"
        "<tr><th>linear</th><th class=\"n\">error, nearest</th><th class=\"n\">scaled</th><th "
        "class=\"n\">now</th><th class=\"n\">alpha</th><th class=\"n\">beta</th><th "
        "class=\"n\">clip</th><th class=\"n\">pre-scale</th><th class=\"n\">max |x|</th><th "
        "class=\"n\">loudest channel</th></tr>";
    for (const json::object* linear : linears_) {
      const auto value = [&](const char* key) { return number(*linear, key); };
      out_ += fmt::format(
          "<tr><td>{}</td><td class=\"n\">{:.4f} %</td><td class=\"n\">{:.4f} %</td><td "
          "class=\"n\">{:.4f} %</td><td class=\"n\">{:.2f}</td><td class=\"n\">{:.2f}</td><td "
          "class=\"n\">{:.3f}</td><td class=\"n\">{:.3g} to {:.3g}</td><td class=\"n\">{:.4g}</td>"
          "<td class=\"n\">{}</td></tr>",
          escape(plain(linear->at("name"))), 100 * value("error_rtn"), 100 * value("error_scaled"),
          100 * value("error"), value("alpha"), value("beta"), value("mean_clip"),
          value("pre_scale_min"), value("pre_scale_max"), value("input_max_abs"),
          value("input_loudest_channel"));
    }
    out_ += "</table></div></details>\n";
  }

  const json::object& report_;
  std::vector<const json::object*> linears_;
  std::string out_;
};

}  // namespace

std::string render_report_html(const json::object& report) { return Page(report).render(); }

}  // namespace nibble
