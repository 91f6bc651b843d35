// Products with packed weights for one instruction set. Written once, in GCC's and Clang's vector
// extensions: a vector of 16 floats is one register with AVX-512, two with AVX2, four with NEON
// (wide.h).
// Built per set in namespace cleave::CLEAVE_ISA (cmake/isa.cmake).

#include "kernels/isa/panel_isa.h"

#include "kernels/isa/panel_activation.h"
#include "kernels/isa/panel_dots.h"
#include "kernels/isa/panel_formats.h"
#include "kernels/isa/panel_int4_row.h"
#include "kernels/isa/panel_multiply.h"
#include "kernels/isa/panel_tiles.h"

namespace cleave::CLEAVE_ISA {
namespace {

template <bool kVnni, const DotKernels* kDotKernels = nullptr>
constexpr PanelKernels kPanels = {
    {
        {multiply<F32, 1>, multiply<F32, 2>, multiply<F32, 4>, multiply<F32, 8>},
        {multiply<BF16, 1>, multiply<BF16, 2>, multiply<BF16, 4>, multiply<BF16, 8>},
        {multiply<F16, 1>, multiply<F16, 2>, multiply<F16, 4>, multiply<F16, 8>},
        {multiply<Int8, 1>, multiply<Int8, 2>, multiply<Int8, 4>, nullptr},
        {multiply_int4<kVnni>, multiply<Int4, 2>, multiply<Int4, 4>, nullptr},
    },
    prepare,
    {multiply_tile<4>, multiply_tile<8>, multiply_tile<12>},
    {multiply_block<1, 1>, multiply_block<2, 1>, multiply_block<3, 1>, multiply_block<4, 1>,
     multiply_block<5, 1>, multiply_block<6, 1>, multiply_block<7, 1>, multiply_block<8, 1>},
    {multiply_block<1, 2>, multiply_block<2, 2>, multiply_block<3, 2>, multiply_block<4, 2>,
     multiply_block<5, 2>, multiply_block<6, 2>},
    {multiply_half<1>, multiply_half<2>, multiply_half<3>, multiply_half<4>, multiply_half<5>,
     multiply_half<6>, multiply_half<7>, multiply_half<8>},
    {nullptr, CLEAVE_UNPACK_AND_MULTIPLY(BF16), CLEAVE_UNPACK_AND_MULTIPLY(F16), nullptr, nullptr},
    {unpack<F32>, unpack<BF16>, unpack<F16>, unpack<Int8>, unpack<Int4>},
    activate,
    kDotKernels,
};

}  // namespace

const PanelKernels& panel_kernels() { return kPanels<false>; }
#if defined(__AVX512BW__)
const PanelKernels& vnni_panel_kernels() { return kPanels<true>; }
const PanelKernels& bf16_panel_kernels() { return kPanels<true, &kDots>; }
#endif

}  // namespace cleave::CLEAVE_ISA
