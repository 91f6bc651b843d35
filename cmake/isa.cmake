# src/kernels/isa/*.cpp is compiled once per instruction set, each time in a namespace of its own
# (cleave::scalar, cleave::avx2, ...); src/kernels/dispatch.cpp chooses at run time.
#
# Eigen is header-only: an inline function of it compiled with -mavx512f would be a weak symbol, and
# the linker might keep that copy for everybody. So its namespace is renamed as well, per set, and
# the test isa_objects_hold_no_weak_symbol watches that nothing else leaks.
file(GLOB isa_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/kernels/isa/*.cpp)
function(cleave_add_isa isa)
  add_library(cleave_${isa} OBJECT ${isa_sources})
  target_compile_definitions(cleave_${isa} PRIVATE CLEAVE_ISA=${isa} Eigen=Eigen_${isa}
    EIGEN_MPL2_ONLY EIGEN_DONT_PARALLELIZE)
  cleave_set_warnings(cleave_${isa})
  cleave_hide_symbols(cleave_${isa})
  # GCC 12 takes _mm512_undefined_ps(), which is undefined on purpose, for a mistake (bug 105593).
  target_compile_options(cleave_${isa} PRIVATE ${ARGN} -ffp-contract=fast -Wno-psabi
    $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized> $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized>)
  target_include_directories(cleave_${isa} PRIVATE ${PROJECT_SOURCE_DIR}/src
    ${PROJECT_SOURCE_DIR}/include)
  target_link_libraries(cleave_${isa} PRIVATE Eigen3::Eigen)
  target_sources(cleave_core PRIVATE $<TARGET_OBJECTS:cleave_${isa}>)
  set_property(GLOBAL APPEND PROPERTY cleave_isa_objects $<TARGET_OBJECTS:cleave_${isa}>)
endfunction()
if(isa_sources)
  cleave_add_isa(scalar)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_compile_definitions(cleave_compute PRIVATE CLEAVE_HAVE_X86_ISA)
    cleave_add_isa(avx2 -mavx2 -mfma -mf16c)
    cleave_add_isa(avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
    enable_language(ASM)
    target_sources(cleave_avx512 PRIVATE ${PROJECT_SOURCE_DIR}/src/kernels/isa/dot_products.S)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
    # Part of every 64-bit ARM, so it needs no option; `scalar` differs in what panel_isa.cpp does by
    # hand.
    target_compile_definitions(cleave_compute PRIVATE CLEAVE_HAVE_NEON_ISA)
    cleave_add_isa(neon)
    target_compile_definitions(cleave_neon PRIVATE CLEAVE_NEON)
  endif()
endif()
