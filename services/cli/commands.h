#pragma once

// The subcommands of `moebius`. Each Add* registers one with its flags; when it was chosen, its
// callback runs and sets *exit_code (0 done, 1 failed; usage errors are 2 and CLI11's).

namespace CLI {
class App;
}

namespace moebius::services {

void AddGenerate(CLI::App& app, int* exit_code);
void AddChat(CLI::App& app, int* exit_code);
void AddScore(CLI::App& app, int* exit_code);
void AddInspect(CLI::App& app, int* exit_code);
void AddConvert(CLI::App& app, int* exit_code);
void AddUp(CLI::App& app, int* exit_code);
void AddStats(CLI::App& app, int* exit_code);
void AddDemo(CLI::App& app, int* exit_code);

}  // namespace moebius::services
