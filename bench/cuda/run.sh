# Runs on a machine with a Hopper GPU, in the folder that ./dev bundle-gpu filled: the tests, compute-sanitizer's tools over
# the tests, and one table of all kernels; gpu-run.json is its record. With arguments (tests, sanitize, bench) only those.
cd "$(dirname "$0")" && export LD_LIBRARY_PATH="$PWD/lib"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || { echo "no GPU here: nothing was run"; exit 1; }

# The tools slow launches and kernels down tens of times: without the tests, known by these words in their names, that
# launch thousands of times or compare every place of large batches. Each program has shorter ones that launch its kernels.
export SHORT="-*Launches*:*SameBits*:*ReachTheBits*:*WouldBe*:*Chunks*:WgmmaChainTest.Bits*:*ForEveryPair*:*Frequencies*:*OfEveryLength*"

# TOOL PROGRAM: a line that begins with "clean" or "FAILED".
sanitize() {
  local tool=$1 test=$2 log=$2.$1.log began=$SECONDS ran options=""
  # memcheck knows where an allocation ends, so buffers need no guards, which would hide reads beyond the end. initcheck
  # looks for what nobody has written, so buffers are not filled; then tests that look for the filling fail, and copies to
  # the host read what no kernel was to write: only what kernels read counts.
  export MOEBIUS_TEST_BUFFERS=exact
  if [ "$tool" = initcheck ]; then MOEBIUS_TEST_BUFFERS=bare options="--check-api-memory-access no"; fi
  timeout 100 compute-sanitizer --tool "$tool" $options --error-exitcode 9 "./$test" --gtest_filter="$SHORT" >"$log" 2>&1
  local status=$?
  ran=$(grep -cE '^\[       OK \]' "$log")
  # 1 is what a program returns whose tests failed; a crash or the time limit is something else.
  if [ "$tool" = initcheck ] && [ "$status" = 1 ] && grep -q '^\[  FAILED  \]' "$log"; then status="0 but for the filling"; fi
  # Where no test ran the tool has nothing to say.
  if [ "${status%% *}" = 0 ] && [ "$ran" -gt 0 ] && grep -q 'ERROR SUMMARY: 0 errors' "$log"; then
    echo "clean   $tool $test: $ran tests, $((SECONDS - began)) s"
  else
    echo "FAILED  $tool $test: status $status, $ran tests, $((SECONDS - began)) s"
    grep -m 20 -E '=========|FAILED' "$log"
  fi
}
export -f sanitize

phases=${*:-tests sanitize bench}
status=0 passed="" failed="" clean=""
if [[ $phases == *tests* ]]; then
  for test in *_test; do
    if timeout 300 "./$test" >"$test.log" 2>&1; then
      echo "ok      $test"
      passed+=" $test"
    else
      echo "FAILED  $test"
      tail -n 30 "$test.log"
      failed+=" $test" status=1
    fi
  done
fi
if [[ $phases == *sanitize* ]]; then
  began=$SECONDS
  # launch_comparison_test launches no kernel of kernels/cuda, and needs two at a time, which the tools don't allow.
  programs=$(ls *_test | grep -v '^launch_comparison_test$')
  # Most of the time is the tools' work on the host, so several programs share the GPU.
  for tool in initcheck memcheck synccheck; do printf "$tool %s\n" $programs; done |
    xargs -P "${JOBS:-$(nproc)}" -L 1 bash -c 'sanitize "$@"' _ | tee sanitize.log
  clean=$(awk '$1 == "clean" {sub(":", "", $3); print $2 ":" $3}' sanitize.log | sort | xargs)
  all=$((3 * $(wc -w <<<"$programs")))
  echo "$(wc -w <<<"$clean") of $all clean, $((SECONDS - began)) s"
  [ "$(wc -w <<<"$clean")" = "$all" ] || status=1
fi
if [[ $phases == *bench* ]]; then
  ./cuda_bench --json gpu-run.json --passed "$passed" --failed "$failed" --sanitized "$clean" || status=1
fi
exit $status
