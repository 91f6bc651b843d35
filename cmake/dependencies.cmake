# Everything comes from the distribution (apt) except LibTorch, which any of a pip wheel, a LibTorch
# archive or the system may provide. One line of reasoning for each: docs/decisions/.
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
find_package(fmt REQUIRED)
find_package(nlohmann_json 3.10 REQUIRED)
find_package(Eigen3 3.3 REQUIRED NO_MODULE)
find_package(OpenSSL REQUIRED COMPONENTS Crypto)
list(APPEND CMAKE_MODULE_PATH ${CMAKE_CURRENT_LIST_DIR})
find_package(PCRE2 REQUIRED)
if(CLEAVE_CLI OR CLEAVE_BENCH)
  find_package(CLI11 REQUIRED)
endif()

if(CLEAVE_TRAIN)
  # LibTorch: Torch_DIR or CMAKE_PREFIX_PATH first, then .venv, then the active Python.
  if(NOT Torch_DIR)
    foreach(python ${PROJECT_SOURCE_DIR}/.venv/bin/python python3)
      execute_process(
        COMMAND ${python} -c "import torch; print(torch.utils.cmake_prefix_path)"
        OUTPUT_VARIABLE torch_prefix OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
        RESULT_VARIABLE torch_missing)
      if(torch_missing EQUAL 0 AND torch_prefix)
        list(APPEND CMAKE_PREFIX_PATH ${torch_prefix})
        break()
      endif()
    endforeach()
  endif()
  find_package(Torch QUIET)
  if(NOT Torch_FOUND)
    message(FATAL_ERROR
      "cleave: LibTorch was not found. Install it (pip install torch==2.13.0 into .venv, or set "
      "Torch_DIR), or configure with -DCLEAVE_TRAIN=OFF: convert, eval and generate need none.")
  endif()
endif()
