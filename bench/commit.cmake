# cmake -P: writes HEADER with the commit of SOURCE_DIR, "-dirty" where files differ from it. Runs with every
# build, and touches the header only if it says something else.
execute_process(COMMAND git -C ${SOURCE_DIR} describe --always --dirty --exclude=* --abbrev=12
                OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  set(commit unknown)  # sources without their history
endif()
file(WRITE ${HEADER}.new "#define CLEAVE_BENCH_COMMIT \"${commit}\"\n")
configure_file(${HEADER}.new ${HEADER} COPYONLY)  # leaves an equal file alone
