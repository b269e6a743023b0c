// moebius: the command people type.

#include <CLI/CLI.hpp>

#include "base/log.h"
#include "services/cli/commands.h"

int main(int argc, char** argv) {
  using namespace moebius::services;
  moebius::base::InitLog("moebius", moebius::base::LogLevel::kWarning);
  CLI::App app("Serves DeepSeek-V3-class mixture-of-experts models as microservices");
  app.require_subcommand(1);
  int exit_code = 0;
  AddUp(app, &exit_code);
  AddGenerate(app, &exit_code);
  AddChat(app, &exit_code);
  AddScore(app, &exit_code);
  AddInspect(app, &exit_code);
  AddConvert(app, &exit_code);
  AddStats(app, &exit_code);
  AddDemo(app, &exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {  // CLI11 reports by exception; it ends here
    return app.exit(error) == 0 ? 0 : 2;
  }
  return exit_code;
}
