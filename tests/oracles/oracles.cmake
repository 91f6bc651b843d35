# Checks against Transformers and llama.cpp, independent implementations (label `oracle`; they skip
# without them).
# CASE names the steps in tests/oracles/check.sh.
function(cleave_add_oracle case timeout)
  add_test(NAME oracle.${case}
    COMMAND bash ${CMAKE_CURRENT_SOURCE_DIR}/oracles/check.sh $<TARGET_FILE:cleave_cli>
            ${PROJECT_BINARY_DIR}/oracle ${case})
  set_tests_properties(oracle.${case} PROPERTIES LABELS oracle TIMEOUT ${timeout}
                       SKIP_RETURN_CODE 77)
endfunction()

if(TARGET cleave_cli)
  add_executable(split_by_hand oracles/split_by_hand.cpp)
  target_include_directories(split_by_hand PRIVATE ${PROJECT_SOURCE_DIR}/tests)
  target_link_libraries(split_by_hand PRIVATE cleave_core)
  cleave_set_warnings(split_by_hand)
  cleave_add_oracle(dense 300)
  cleave_add_oracle(converted 300)
  cleave_add_oracle(hard_gate 300)
  cleave_add_oracle(shared 300)
  cleave_add_oracle(shared_hard_gate 300)
  cleave_add_oracle(pruned 300)
  cleave_add_oracle(budget 300)
  cleave_add_oracle(encoder 300)
  cleave_add_oracle(minilm 300)
  cleave_add_oracle(llama_cpp 300)
  cleave_add_oracle(smollm2_llama_cpp 900)
  if(CLEAVE_TRAIN)
    cleave_add_oracle(tuned 300)
  endif()
  cleave_add_oracle(smollm2_converted 900)
  cleave_add_oracle(smollm2_shared 900)
  cleave_add_oracle(smollm2_budget 900)
  cleave_add_oracle(smollm2_perplexity 900)
endif()
