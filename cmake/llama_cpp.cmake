# llama.cpp, as scripts/fetch_llama_cpp.sh built it: what cleave is compared with, and an engine to link
# into. Target llama_cpp where it is there; nothing but an example and a benchmark asks for it.
set(CLEAVE_LLAMA_CPP ${PROJECT_SOURCE_DIR}/.venv-oracle/llama.cpp CACHE PATH
    "llama.cpp: a folder with `source` and its `build`, see scripts/fetch_llama_cpp.sh")
if(EXISTS ${CLEAVE_LLAMA_CPP}/build/src/libllama.a AND (CLEAVE_EXAMPLES OR CLEAVE_BENCH))
  set(examples ${PROJECT_SOURCE_DIR}/examples/llama_cpp_custom_op)
  add_library(llama_cpp INTERFACE)
  # `src` for the hook of the example; the other headers are public ones.
  target_include_directories(llama_cpp SYSTEM INTERFACE ${CLEAVE_LLAMA_CPP}/source/include
    ${CLEAVE_LLAMA_CPP}/source/ggml/include ${CLEAVE_LLAMA_CPP}/source/src)
  target_link_libraries(llama_cpp INTERFACE ${CLEAVE_LLAMA_CPP}/build/src/libllama.a)
  foreach(library ggml ggml-cpu ggml-base)
    target_link_libraries(llama_cpp INTERFACE ${CLEAVE_LLAMA_CPP}/build/ggml/src/lib${library}.a)
  endforeach()
  find_package(OpenMP QUIET COMPONENTS CXX)  # ggml's threads, unless it was built without
  target_link_libraries(llama_cpp INTERFACE
    $<$<BOOL:${OpenMP_CXX_FOUND}>:OpenMP::OpenMP_CXX> Threads::Threads ${CMAKE_DL_LIBS})

  # What the example and the benchmarks have in common.
  add_library(llama_cpp_session STATIC ${examples}/gguf_writer.cpp ${examples}/llama_session.cpp)
  target_include_directories(llama_cpp_session PUBLIC ${examples})
  target_link_libraries(llama_cpp_session PUBLIC cleave_core llama_cpp)
  cleave_set_warnings(llama_cpp_session)
endif()
