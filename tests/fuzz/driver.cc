// A stand-in for libFuzzer's main: replays every file of the corpus folders named on the command
// line, then a fixed number (-runs=N) of seeded mutations of them. Deterministic, so ctest can run
// every fuzz target on every machine, under the sanitizers too. It has no coverage feedback: use
// `./dev fuzz` (clang) to search, and add what it finds to the corpus.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "base/prng.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Input = std::vector<uint8_t>;

std::vector<Input> ReadCorpus(const std::vector<std::string>& folders) {
  std::vector<std::filesystem::path> paths;
  for (const std::string& folder : folders) {
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      if (entry.is_regular_file()) paths.push_back(entry.path());
    }
  }
  std::sort(paths.begin(), paths.end());
  std::vector<Input> corpus;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  corpus.push_back({});
  return corpus;
}

void Mutate(Input& input, const std::vector<Input>& corpus, moebius::Prng& prng) {
  static constexpr uint8_t kInteresting[] = {0,    1,   0x7F, 0x80, 0xFF, '"',
                                             '\\', '{', '}',  '[',  ']',  ','};
  const uint64_t edits = 1 + prng.Below(8);
  for (uint64_t i = 0; i < edits; ++i) {
    const uint64_t at = input.empty() ? 0 : prng.Below(input.size());
    switch (prng.Below(6)) {
      case 0:
        if (!input.empty()) input[at] ^= static_cast<uint8_t>(1u << prng.Below(8));
        break;
      case 1:
        if (!input.empty()) input[at] = kInteresting[prng.Below(std::size(kInteresting))];
        break;
      case 2:
        input.insert(input.begin() + static_cast<int64_t>(at), static_cast<uint8_t>(prng.Next()));
        break;
      case 3:
        if (!input.empty()) input.erase(input.begin() + static_cast<int64_t>(at));
        break;
      case 4:
        input.resize(prng.Below(input.size() + 1));
        break;
      case 5: {
        const Input& other = corpus[prng.Below(corpus.size())];
        if (!other.empty()) {
          const uint64_t from = prng.Below(other.size());
          const uint64_t length = std::min<uint64_t>(prng.Below(64) + 1, other.size() - from);
          input.insert(input.begin() + static_cast<int64_t>(at),
                       other.begin() + static_cast<int64_t>(from),
                       other.begin() + static_cast<int64_t>(from + length));
        }
        break;
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t runs = 1000;
  std::vector<std::string> folders;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("-runs=", 0) == 0) {
      runs = std::strtoull(argument.c_str() + 6, nullptr, 10);
    } else {
      folders.push_back(argument);
    }
  }
  const std::vector<Input> corpus = ReadCorpus(folders);
  for (const Input& input : corpus) LLVMFuzzerTestOneInput(input.data(), input.size());
  moebius::Prng prng(1);
  for (uint64_t run = 0; run < runs; ++run) {
    Input input = corpus[prng.Below(corpus.size())];
    Mutate(input, corpus, prng);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%zu corpus inputs and %llu mutations: no crash\n", corpus.size(),
              static_cast<unsigned long long>(runs));
  return 0;
}
