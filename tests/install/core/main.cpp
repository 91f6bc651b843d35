// A project outside that uses the installed package: everything it needs is in the umbrella header.
#include <cleave/cleave.h>

int main() {
  cleave::DenseFfn ffn;
  ffn.hidden = 4;
  ffn.d_model = 2;
  ffn.up = {1, 2, 3, 4, 5, 6, 7, 8};
  ffn.down = ffn.up;
  const auto partition = cleave::partition_neurons(ffn.view(), {.num_experts = 2});
  const auto bank = cleave::factorize(ffn.view(), partition);
  try {
    cleave::check_divides(3, 4);
    return 1;
  } catch (const cleave::InvalidArgument&) {
  }
  try {
    cleave::Checkpoint::open("/nonexistent");  // links the readers, OpenSSL and PCRE2 as well
    return 2;
  } catch (const cleave::FileError&) {
  }
  return cleave::to_dense(bank).up == ffn.up ? 0 : 3;
}
