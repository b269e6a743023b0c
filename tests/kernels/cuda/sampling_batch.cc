#include "tests/kernels/cuda/sampling_batch.h"

#include <cmath>

namespace moebius::kernels::cuda {

std::vector<float> RandomRow(Prng& random, int64_t vocab, Shape shape) {
  std::vector<float> row(static_cast<size_t>(vocab));
  // Cheap, nearly normal: 129,280 logarithms a row would be most of the test's time.
  for (float& z : row)
    z = (random.Unit() + random.Unit() + random.Unit() + random.Unit() - 2) * 1.7f;
  const auto place = [&] { return random.Below(static_cast<uint64_t>(vocab)); };
  switch (shape) {
    case Shape::kWide:
      for (float& z : row) z *= 4;
      break;
    case Shape::kPeaked:
      for (int i = 0; i < 30; ++i) row[place()] = 6.0f + 7.0f * random.Unit();
      break;
    case Shape::kTies:
      for (float& z : row) z = std::round(z * 2) / 2;
      for (int i = 0; i < 100; ++i) row[place()] = i % 2 ? -0.0f : 0.0f;
      break;
    case Shape::kEqual:
      std::fill(row.begin(), row.end(), -3.25f);
      break;
    case Shape::kFewFinite:
      for (float& z : row) z = random.Below(50) == 0 ? z : -kInfinity;
      row[place()] = 1.0f;
      break;
    case Shape::kOneFar:
      row[place()] = 60.0f;
      break;
    default:
      break;
  }
  return row;
}

std::vector<SamplingParams> Mixture() {
  return {{.temperature = 1.0f},
          {.temperature = 1.0f, .top_k = 50, .top_p = 0.95f},
          {.temperature = 0.7f, .top_p = 0.9f},
          {.temperature = 1.3f, .top_k = 1},
          {.temperature = 0.3f, .top_k = 20},
          {.temperature = 2.5f, .top_k = 400, .top_p = 0.5f},
          {.temperature = 1.0f, .top_k = 3000},
          {.temperature = 1.0f, .top_k = 60000, .top_p = 0.99f},
          {.temperature = 1.0f, .top_p = 0.999f},
          {.temperature = 0.05f, .top_p = 0.3f},
          {.temperature = 50.0f, .top_p = 0.8f},
          {.temperature = 1.0f, .top_k = 100, .top_p = 1e-9f},
          {.temperature = 0.9f, .top_p = 0.02f}};
}

}  // namespace moebius::kernels::cuda
