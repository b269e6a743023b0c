#include "services/common/buffer_classes.h"

#include <algorithm>

#include "proto/wire/dispatch.h"
#include "services/common/model_host.h"

namespace moebius::services {

std::vector<runtime::BufferClass> MakeBufferClasses(const model::ModelConfig& config,
                                                    uint32_t max_rows, uint32_t peers) {
  constexpr uint64_t kSmallest = 4096;
  constexpr uint64_t kFramePadding = 256;  // of one frame's sections, generously
  const wire::RowLimits limits = MakeRowLimits(config, max_rows);
  const uint64_t sent_rows = uint64_t{max_rows} * std::min(limits.top_k, peers);
  const uint64_t items = uint64_t{max_rows} * limits.top_k;
  const uint64_t frames = peers + (sent_rows + kRowsPerFrame - 1) / kRowsPerFrame;
  const uint64_t answers = wire::CombineBytes(limits, items) + frames * kFramePadding;
  const uint64_t dispatch =
      wire::LayoutOfDispatch(limits, sent_rows, items).total_bytes + frames * kFramePadding;
  const uint64_t route = uint64_t{max_rows} * limits.hidden * 2;
  const uint64_t frame_items = uint64_t{kRowsPerFrame} * limits.top_k;
  const uint64_t largest =
      std::max({wire::CombineBytes(limits, frame_items),
                wire::LayoutOfDispatch(limits, kRowsPerFrame, frame_items).total_bytes, route});

  std::vector<runtime::BufferClass> classes;
  for (uint64_t size = largest; size > kSmallest; size /= 2) {
    const auto fit = [&](uint64_t bytes) { return std::min(frames, bytes / (size / 2) + 1); };
    uint64_t count = fit(answers) + fit(dispatch);
    count += fit(answers) / 4;
    if (size == largest) count += 4;
    classes.push_back({size, static_cast<uint32_t>(count)});
  }
  classes.push_back({kSmallest, static_cast<uint32_t>(4 * frames + 4 * peers + 256)});
  std::reverse(classes.begin(), classes.end());
  return classes;
}

}  // namespace moebius::services
