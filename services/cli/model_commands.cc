// moebius inspect and convert.

#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>
#include <string>

#include "base/status_macros.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/convert.h"
#include "model/inspect.h"
#include "model/manifest.h"
#include "services/cli/commands.h"

namespace moebius::services {
namespace {

struct InspectFlags {
  std::string dir;
  bool json = false;
  bool manifest = false;
};

absl::Status RunInspect(const InspectFlags& flags) {
  ASSIGN_OR_RETURN(const model::ModelConfig config, model::LoadConfig(flags.dir));
  ASSIGN_OR_RETURN(const std::unique_ptr<model::Checkpoint> checkpoint,
                   model::Checkpoint::Open(flags.dir));
  const model::ModelReport report = model::InspectModel(*checkpoint, config);
  std::cout << (flags.json ? model::ReportToJson(report) : model::FormatReport(report)) << "\n";
  if (flags.manifest) {
    ASSIGN_OR_RETURN(
        const model::Manifest manifest,
        model::LoadOrComputeManifest(*checkpoint, config, model::DefaultManifestCacheDir()));
    std::cout << "digest " << model::ToHex(manifest.digest) << "\n";
  }
  return absl::OkStatus();
}

int Report(const absl::Status& status) {
  if (status.ok()) return 0;
  std::cerr << "moebius: " << status.message() << "\n";
  return 1;
}

}  // namespace

void AddInspect(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<InspectFlags>();
  CLI::App* command = app.add_subcommand("inspect", "what a model directory holds");
  command->add_option("dir,--model", flags->dir)->required()->check(CLI::ExistingDirectory);
  command->add_flag("--json", flags->json);
  command->add_flag("--manifest", flags->manifest,
                    "compute (or read) the manifest and print the model's digest");
  command->callback([flags, exit_code] { *exit_code = Report(RunInspect(*flags)); });
}

void AddConvert(CLI::App& app, int* exit_code) {
  struct Flags {
    std::string to, in, out;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app.add_subcommand("convert", "rewrite a model with BF16 or FP8 weights");
  command->add_option("--to", flags->to)->required()->check(CLI::IsMember({"bf16", "fp8"}));
  command->add_option("in", flags->in)->required()->check(CLI::ExistingDirectory);
  command->add_option("out", flags->out)->required();
  command->callback([flags, exit_code] {
    model::ConvertOptions options;
    options.target = flags->to == "fp8" ? model::ConvertTarget::kFp8 : model::ConvertTarget::kBf16;
    *exit_code = Report(model::ConvertModel(flags->in, flags->out, options));
  });
}

}  // namespace moebius::services
