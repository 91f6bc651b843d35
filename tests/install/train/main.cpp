// A project outside that uses the installed training library.
#include <cleave/cleave.h>
#include <cleave/train/losses.h>

#include <ATen/ATen.h>

int main() {
  const at::Tensor logits = at::zeros({3, 4});
  const at::Tensor target = at::full({3, 4}, 0.25);
  const at::Tensor loss =
      cleave::train::prior_approximate_loss(logits, target, cleave::train::PaForm::kRouterFirst);
  return std::abs(loss.item<double>()) < 1e-6 ? 0 : 1;
}
