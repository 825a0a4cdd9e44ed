#!/usr/bin/env bash
# Runs the native code under sanitizers. The harness runs under ThreadSanitizer, and again under
# AddressSanitizer and UndefinedBehaviorSanitizer. Then the Python tests of the kernel run with an
# extension that is built with AddressSanitizer and UndefinedBehaviorSanitizer. Fails if a sanitizer
# reports anything. Needs Linux and gcc.
#
#     tests/native/sanitize.sh [python]
set -euo pipefail
python=$(realpath -s "$(command -v "${1:-python3}")") # resolved before `cd`
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
compile=(g++ -std=c++17 -g -ffp-contract=off -Wall -Wextra -Werror)
address=(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)

# Work in a copy, so that no build, cache or extension of the source tree is used.
cp -r lars_tree tests docs pyproject.toml README.md CHANGELOG.md "$work"
cd "$work"
kernel=$work/lars_tree/_native/_kernel.abi3.so
rm -f lars_tree/_native/_kernel*.so
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
harness=("${compile[@]}" -pthread -I lars_tree/_native tests/native/harness.cpp)

"${harness[@]}" -O3 -o plain
"${harness[@]}" -O1 -fsanitize=thread -o thread &
thread=$!
"${harness[@]}" -O1 "${address[@]}" -o address
wait "$thread"
"${compile[@]}" -O1 "${address[@]}" -fPIC -shared -Wno-cast-function-type -isystem "$headers" \
    lars_tree/_native/module.cpp -o "$kernel" &
extension=$!

export ASAN_OPTIONS=halt_on_error=1:detect_leaks=0:allocator_may_return_null=1
ASAN_OPTIONS+=:detect_stack_use_after_return=1:quarantine_size_mb=64:log_path=$work/report
export UBSAN_OPTIONS=print_stacktrace=1:log_path=$work/report
export TSAN_OPTIONS=halt_on_error=1:log_path=$work/report

reported() { # shows the reports, which the tests may have captured; fails if there are none
    compgen -G "$work/report*" >/dev/null && cat "$work"/report* >&2
}
run() { # exits at a failure, and at a report, even of a process whose exit status was ignored
    local status=0
    "$@" || status=$?
    if reported || [ "$status" != 0 ]; then
        echo "failed ($status): $*" >&2
        exit 1
    fi
}

team=(env OMP_NUM_THREADS=8) # as many threads as the harness asks for at most

echo "== The harness, as optimised as the extension"
run ./plain quick
run "${team[@]}" ./plain quick team
echo "== The harness under ThreadSanitizer"
# ThreadSanitizer fails if address randomization leaves no room for its shadow memory.
fixed=(setarch "$(uname -m)" -R)
"${fixed[@]}" true 2>/dev/null || fixed=()
run "${fixed[@]}" ./thread quick
run "${fixed[@]}" "${team[@]}" ./thread quick team
echo "== The harness under AddressSanitizer and UndefinedBehaviorSanitizer"
ASAN_OPTIONS+=:detect_leaks=1 run ./address quick
ASAN_OPTIONS+=:detect_leaks=1 run "${team[@]}" ./address quick team
wait "$extension"

echo "== The Python tests of the kernel, with the sanitized extension"
cat >sanitized.py <<'PYTHON' # a pytest plugin, so that the workers of pytest-xdist run it too
import ctypes, os
import lars_tree
from lars_tree import _native

package = os.path.join(os.environ["PYTHONPATH"], "lars_tree")
assert os.path.samefile(os.path.dirname(lars_tree.__file__), package), lars_tree.__file__
assert lars_tree.native_available(), "the sanitized kernel cannot be imported"
kernel = os.path.join(package, "_native", "_kernel.abi3.so")
assert os.path.samefile(_native.kernel.__file__, kernel), _native.kernel.__file__
with open(kernel, "rb") as file:
    code = file.read()
assert b"__asan_report" in code and b"__ubsan_handle" in code, "the kernel is not sanitized"
assert ctypes.CDLL(None).__asan_init, "the sanitizer is not there"
PYTHON
library() { gcc -print-file-name="lib$1.so"; }
tests=(tests/test_native*.py tests/test_memory.py tests/test_numbers.py tests/test_errors.py)
run env -u LARS_TREE_NATIVE LD_PRELOAD="$(library asan) $(library ubsan)" PYTHONMALLOC=malloc \
    PYTHONPATH="$work" PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_PROFILE=repeatable \
    "$python" -m pytest -q -n 2 -p sanitized -p no:cacheprovider \
    -k "not jit and not compiled and not array_operations" "${tests[@]}" tests/native
echo "No sanitizer reported anything"
