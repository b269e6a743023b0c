#include "attention_worker/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace moebius::attention_worker {

StopMatcher::StopMatcher(std::vector<std::string> stop_strings)
    : stop_strings_(std::move(stop_strings)) {
  stop_strings_.erase(std::remove_if(stop_strings_.begin(), stop_strings_.end(),
                                     [](const std::string& s) { return s.empty(); }),
                      stop_strings_.end());
  for (const std::string& stop : stop_strings_) longest_ = std::max(longest_, stop.size());
  // Room for the tail and a long token, so that steps do not allocate.
  if (longest_ > 0) window_.reserve(longest_ + 512);
}

bool StopMatcher::Append(absl::string_view text) {
  if (matched_ || stop_strings_.empty()) return matched_;
  window_.append(text.data(), text.size());
  for (const std::string& stop : stop_strings_) {
    if (window_.find(stop) != std::string::npos) return matched_ = true;
  }
  // A match yet to complete can have at most longest_ - 1 bytes behind us.
  if (window_.size() > longest_ - 1) window_.erase(0, window_.size() - (longest_ - 1));
  return false;
}

}  // namespace moebius::attention_worker
