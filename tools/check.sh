#!/usr/bin/env bash
# Style, format and types of every source file.
#
# `mypy -p fxpipe` at the root would miss fxpipe.passes and fxpipe.triton_kernels, which lie beside the package and not in it,
# and report success. So mypy reads a folder of links laid out as the package is installed.
# SOURCE: another tree to check (for the test that plants errors). ONLY_TYPES=1: mypy alone.
set -eu
bin=$(cd "${BIN:-.venv/bin}" && pwd)
root=$(cd "${SOURCE:-$(dirname "$0")/..}" && pwd)
cd "$root"
if [ -z "${ONLY_TYPES:-}" ]; then
  "$bin/ruff" check
  "$bin/ruff" format --check
fi
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
mkdir "$links/fxpipe"
ln -s "$root"/fxpipe/* "$links/fxpipe/"
ln -s "$root/passes" "$root/triton_kernels" "$links/fxpipe/"
ln -s "$root/tools" "$links/tools"
cd "$links"
# The paths in the messages are made those of the checkout again.
"$bin/mypy" --config-file "$root/pyproject.toml" --python-executable "$bin/python" --cache-dir "${MYPY_CACHE_DIR:-$root/.mypy_cache}" -p fxpipe |
  sed -E 's,^fxpipe/(passes|triton_kernels)/,\1/,'
exit "${PIPESTATUS[0]}"
