#pragma once

#include "token_table.h"

namespace cleave {

class JsonNode;

/// `model.vocab` of a `tokenizer.json`: an object of spellings and their ids.
/// @throws FileError  no such object, or an id outside 0..2^24 - 1
TokenTable read_vocabulary(const JsonNode& vocab);

}  // namespace cleave
