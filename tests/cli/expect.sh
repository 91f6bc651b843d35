# Sourced by the tests of the command line: WORK_DIR made anew and entered, and what they check with.
enter() { # enter WORK_DIR
  rm -rf "$1" && mkdir -p "$1" && cd "$1" || exit 2
}
status=0
fail() { echo "FAILED: $*"; status=1; }
expect() { # expect CODE COMMAND...: stdout to out.txt, stderr to err.txt
  code=$1
  shift
  "$@" >out.txt 2>err.txt
  actual=$?
  [ $actual -eq "$code" ] || fail "expected code $code, got $actual: $* ($(head -1 err.txt))"
}
says() { grep -q -- "$2" "$1" || fail "$1 does not say '$2': $(head -5 "$1")"; }
