# Rules that matter are tests. Each is a small shell script in guards/, and guards_can_fail shows
# that each stops what it is meant to stop.
set(guards ${CMAKE_CURRENT_SOURCE_DIR}/guards)
function(cleave_add_guard name script)
  add_test(NAME ${name} COMMAND sh ${guards}/${script} ${ARGN} COMMAND_EXPAND_LISTS)
  set_tests_properties(${name} PROPERTIES LABELS "quick;guards" TIMEOUT 300)
endfunction()

cleave_add_guard(guards_can_fail self_test.sh ${CMAKE_CXX_COMPILER} ${guards}
                 ${CMAKE_CURRENT_BINARY_DIR}/guards ${CMAKE_C_COMPILER})
cleave_add_guard(core_has_no_torch_symbol no_torch_symbol.sh $<TARGET_FILE:cleave_core>)
# Sanitizers bring calls of their own.
if(NOT CMAKE_CXX_FLAGS MATCHES "-fsanitize")
  cleave_add_guard(core_never_prints_or_exits no_print_or_exit.sh $<TARGET_FILE:cleave_core>
                   ${PROJECT_SOURCE_DIR})
  # Without optimisation the compiler emits every inline function, intrinsics included.
  if(CMAKE_BUILD_TYPE MATCHES "^(Release|RelWithDebInfo|MinSizeRel)$")
    foreach(isa scalar avx2 avx512 neon)
      if(TARGET cleave_${isa})
        cleave_add_guard(isa_objects_hold_no_weak_symbol_${isa} no_weak_symbol.sh ${isa}
                         $<TARGET_OBJECTS:cleave_${isa}>)
      endif()
    endforeach()
  endif()
endif()
# The runtime needs no LibTorch: what links core alone, beside train too, and the command line without train.
foreach(target factorize_one_ffn serve_without_libtorch cleave_c)
  if(TARGET ${target})
    cleave_add_guard(${target}_loads_no_torch no_torch_linked.sh $<TARGET_FILE:${target}>)
  endif()
endforeach()
if(TARGET cleave_cli AND cleave_static)
  cleave_add_guard(static_cli_loads_nothing static_program.sh $<TARGET_FILE:cleave_cli>)
elseif(TARGET cleave_cli AND NOT CLEAVE_TRAIN)
  cleave_add_guard(core_only_cli_loads_no_torch no_torch_linked.sh $<TARGET_FILE:cleave_cli>)
endif()
if(CMAKE_BUILD_TYPE STREQUAL "Release" AND NOT CMAKE_CXX_FLAGS MATCHES "-fsanitize")
  if(TARGET cleave_cli AND cleave_static)
    cleave_add_guard(static_cli_is_small library_size.sh ${CMAKE_CXX_COMPILER} $<TARGET_FILE:cleave_cli>
                     6000000 ${CMAKE_CURRENT_BINARY_DIR}/guards_cli_size)
  endif()
  cleave_add_guard(core_is_small library_size.sh ${CMAKE_CXX_COMPILER} $<TARGET_FILE:cleave_core>
                   3000000 ${CMAKE_CURRENT_BINARY_DIR}/guards_size)
endif()
cleave_add_guard(only_train_includes_torch includes.sh ${PROJECT_SOURCE_DIR})
cleave_add_guard(public_headers_compile_alone headers_alone.sh ${CMAKE_CXX_COMPILER}
                 ${PROJECT_SOURCE_DIR}/include)
if(TARGET cleave_c)
  cleave_add_guard(c_interface_exports c_symbols.sh $<TARGET_FILE:cleave_c> ${PROJECT_SOURCE_DIR}/include)
endif()
# With LibTorch comes a dlpack.h, to try ours beside it.
if(CLEAVE_TRAIN)
  find_file(CLEAVE_DLPACK_H ATen/dlpack.h PATHS ${TORCH_INCLUDE_DIRS} NO_DEFAULT_PATH)
  mark_as_advanced(CLEAVE_DLPACK_H)
endif()
cleave_add_guard(c_headers_are_c99 c_headers.sh ${CMAKE_C_COMPILER} ${CMAKE_CXX_COMPILER}
                 ${PROJECT_SOURCE_DIR}/include $<$<BOOL:${CLEAVE_DLPACK_H}>:${CLEAVE_DLPACK_H}>)

# ---- The installed package and the source tree serve projects outside. ----
function(cleave_add_consumer name)
  cmake_parse_arguments(arg "" "" "LABELS" ${ARGN})
  add_test(NAME install_consumer_${name}
    COMMAND ${CMAKE_COMMAND} -D CONSUMER=${name} -D CLEAVE_SOURCE_DIR=${PROJECT_SOURCE_DIR}
      -D CLEAVE_BINARY_DIR=${PROJECT_BINARY_DIR} -D WORK_DIR=${CMAKE_CURRENT_BINARY_DIR}/install/${name}
      -D "GENERATOR=${CMAKE_GENERATOR}" -D CXX_COMPILER=${CMAKE_CXX_COMPILER}
      -D C_COMPILER=${CMAKE_C_COMPILER} -D "CXX_FLAGS=${CMAKE_CXX_FLAGS}" -D LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER}
      -D "TORCH_DIR=${Torch_DIR}" -P ${CMAKE_CURRENT_SOURCE_DIR}/install/run_consumer.cmake)
  set_tests_properties(install_consumer_${name} PROPERTIES LABELS "${arg_LABELS}" TIMEOUT 900)
endfunction()
cleave_add_consumer(core LABELS quick guards)
if(CLEAVE_SHARED)
  cleave_add_consumer(c LABELS quick guards)
endif()
cleave_add_consumer(subdirectory LABELS slow)
if(CLEAVE_TRAIN)
  cleave_add_consumer(train LABELS slow)
else()
  cleave_add_consumer(missing_train LABELS quick guards)
endif()
