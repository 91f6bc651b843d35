# cmake -P: installs cleave under WORK_DIR and configures, builds and runs a project there that uses
# it. CONSUMER names the project's folder; `missing_train` expects find_package to say no.
set(source ${CMAKE_CURRENT_LIST_DIR}/${CONSUMER})
set(prefix ${WORK_DIR}/prefix)
file(REMOVE_RECURSE ${WORK_DIR})
file(MAKE_DIRECTORY ${WORK_DIR})

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_VARIABLE output
                  ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    string(REPLACE ";" " " command "${ARGN}")
    message(FATAL_ERROR "${command}\nended with ${status}:\n${output}")
  endif()
endfunction()

if(NOT CONSUMER STREQUAL "subdirectory")
  run(${CMAKE_COMMAND} --install ${CLEAVE_BINARY_DIR} --prefix ${prefix})
endif()
if(CONSUMER STREQUAL "c")
  # Not CMake's find_package() but pkg-config, against the shared library and then the static one.
  run(sh ${source}/build.sh ${C_COMPILER} ${prefix} ${WORK_DIR} ${CXX_FLAGS})
  return()
endif()
set(configure ${CMAKE_COMMAND} -S ${source} -B ${WORK_DIR}/build -G ${GENERATOR}
    -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_COMPILER=${CXX_COMPILER} "-DCMAKE_CXX_FLAGS=${CXX_FLAGS}"
    -DCMAKE_CXX_COMPILER_LAUNCHER=${LAUNCHER} -DCMAKE_PREFIX_PATH=${prefix}
    -DCLEAVE_SOURCE_DIR=${CLEAVE_SOURCE_DIR} -DTorch_DIR=${TORCH_DIR})
if(CONSUMER STREQUAL "missing_train")
  # The same project as `train`, against a build without it: it must fail, and say what to do.
  list(TRANSFORM configure REPLACE "^${source}$" ${CMAKE_CURRENT_LIST_DIR}/train)
  execute_process(COMMAND ${configure} RESULT_VARIABLE status OUTPUT_VARIABLE output
                  ERROR_VARIABLE output)
  if(status EQUAL 0 OR NOT output MATCHES "CLEAVE_TRAIN=OFF")
    message(FATAL_ERROR "find_package(cleave COMPONENTS train) should have failed and named "
                        "CLEAVE_TRAIN=OFF; it ended with ${status}:\n${output}")
  endif()
  return()
endif()
run(${configure})
run(${CMAKE_COMMAND} --build ${WORK_DIR}/build)
run(${WORK_DIR}/build/consumer)
