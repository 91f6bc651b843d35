#pragma once

#include <stdexcept>
#include <string>

namespace cleave {

// Every message has the same four parts: what failed (the function or the file), the fact, what was
// expected, the way out. The library throws; it never prints and never exits.

/// Base of everything the library throws on purpose.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Your arguments cannot be honoured: a shape disagrees, E does not divide H, K > E. The command
/// line turns it into exit code 2.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// Your file is at fault: truncated, malformed, missing, of an unsupported kind. Names the file
/// and, where there is one, the tensor or key. The command line turns it into exit code 1.
class FileError : public Error {
 public:
  using Error::Error;
};

}  // namespace cleave
