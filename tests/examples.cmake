# The examples run. C programs also run under valgrind, where there is one.
function(cleave_add_example name)
  if(TARGET ${name})
    add_test(NAME example_${name} COMMAND ${name} ${ARGN})
    set_tests_properties(example_${name} PROPERTIES LABELS quick TIMEOUT 120)
  endif()
endfunction()
cleave_add_example(factorize_one_ffn)
cleave_add_example(c_api)
if(TARGET serve_without_libtorch)
  add_test(NAME example_serve_without_libtorch
    COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/says.sh "The history of [A-Za-z0-9]+" $<TARGET_FILE:serve_without_libtorch>
      ${PROJECT_SOURCE_DIR}/examples/models/demo-llama "The history of")
  set_tests_properties(example_serve_without_libtorch PROPERTIES LABELS quick TIMEOUT 120)
endif()

# Sanitizers do what valgrind does, and the two exclude each other.
if(TARGET c_api AND NOT CMAKE_CXX_FLAGS MATCHES "-fsanitize")
  add_test(NAME example_c_api_under_valgrind
    COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/valgrind.sh $<TARGET_FILE:c_api>)
  set_tests_properties(example_c_api_under_valgrind PROPERTIES LABELS "quick;valgrind" TIMEOUT 300
    SKIP_RETURN_CODE 77)
endif()
