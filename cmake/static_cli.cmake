# The command line as one file that needs no library of the machine it runs on (docs/decisions/0013).
set(CLEAVE_STATIC_CLI AUTO CACHE STRING
    "Link the command line statically: ON, OFF, or AUTO: where LibTorch is not in it and the archives are here")
set_property(CACHE CLEAVE_STATIC_CLI PROPERTY STRINGS AUTO ON OFF)
set(cleave_static_dir ${CMAKE_CURRENT_LIST_DIR}/static_cli)
# Position-independent, so that it is placed at random as a dynamic program is.
set(cleave_static_link -static-pie -Wl,--gc-sections)

# The archives of what core links. Where there is none of fmt, it is compiled from its headers.
foreach(library ${OPENSSL_CRYPTO_LIBRARY} ${PCRE2_LIBRARY})
  get_filename_component(folder ${library} DIRECTORY)
  get_filename_component(name ${library} NAME_WE)
  find_library(CLEAVE_${name}_ARCHIVE ${name}.a HINTS ${folder})
  mark_as_advanced(CLEAVE_${name}_ARCHIVE)
  list(APPEND cleave_static_libraries ${CLEAVE_${name}_ARCHIVE})
endforeach()
list(APPEND cleave_static_libraries Threads::Threads)
get_target_property(fmt_type fmt::fmt TYPE)
if(fmt_type STREQUAL "STATIC_LIBRARY")
  list(APPEND cleave_static_libraries fmt::fmt)
else()
  set(cleave_static_sources ${cleave_static_dir}/fmt.cpp)
endif()

# Why it cannot be, or "". A success is remembered, a failure tried again.
function(cleave_check_static_cli problem)
  set(${problem} "" PARENT_SCOPE)
  if(CLEAVE_TRAIN)
    set(${problem} "LibTorch comes as shared libraries (CLEAVE_TRAIN=OFF goes without)" PARENT_SCOPE)
  elseif(CMAKE_CXX_FLAGS MATCHES "-fsanitize")
    set(${problem} "sanitizers need a dynamic program" PARENT_SCOPE)
  elseif(cleave_static_libraries MATCHES "CLEAVE_(lib[^;]*)_ARCHIVE-NOTFOUND")
    set(${problem} "${CMAKE_MATCH_1}.a was not found (it comes with the library's headers)" PARENT_SCOPE)
  elseif(NOT CLEAVE_STATIC_LINKS)
    get_target_property(includes fmt::fmt INTERFACE_INCLUDE_DIRECTORIES)
    try_compile(CLEAVE_STATIC_LINKS ${PROJECT_BINARY_DIR}/static_cli
      SOURCES ${cleave_static_dir}/check.cpp ${cleave_static_sources}
      CMAKE_FLAGS "-DINCLUDE_DIRECTORIES=${includes};${PCRE2_INCLUDE_DIR};${OPENSSL_INCLUDE_DIR}"
      COMPILE_DEFINITIONS -fPIE -fno-inline
      LINK_OPTIONS ${cleave_static_link} LINK_LIBRARIES ${cleave_static_libraries}
      OUTPUT_VARIABLE output CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON)
    if(NOT CLEAVE_STATIC_LINKS)
      file(WRITE ${PROJECT_BINARY_DIR}/static_cli/output.txt "${output}")
      set(${problem} "a small static program does not link (see static_cli/output.txt)" PARENT_SCOPE)
    endif()
  endif()
endfunction()

set(cleave_static OFF)
if(CLEAVE_STATIC_CLI STREQUAL "AUTO")
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND NOT CMAKE_CROSSCOMPILING AND NOT CLEAVE_TRAIN)
    cleave_check_static_cli(problem)
    if(problem)
      message(STATUS "cleave: the command line will need shared libraries: ${problem}")
    else()
      set(cleave_static ON)
    endif()
  endif()
elseif(CLEAVE_STATIC_CLI)
  cleave_check_static_cli(problem)
  if(problem)
    message(FATAL_ERROR "cleave: CLEAVE_STATIC_CLI=ON, but ${problem}. With OFF it is linked with shared libraries.")
  endif()
  set(cleave_static ON)
endif()

# Links core and its archives. By its file: the target would bring the shared libraries along.
function(cleave_link_statically target)
  target_sources(${target} PRIVATE ${cleave_static_sources})
  if(cleave_static_sources)
    set_source_files_properties(${cleave_static_sources} PROPERTIES COMPILE_OPTIONS -fno-inline
      SKIP_UNITY_BUILD_INCLUSION ON SKIP_PRECOMPILE_HEADERS ON)
  endif()
  add_dependencies(${target} cleave_core)
  get_target_property(fmt_includes fmt::fmt INTERFACE_INCLUDE_DIRECTORIES)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/include)
  target_include_directories(${target} SYSTEM PRIVATE ${fmt_includes})
  target_link_libraries(${target} PRIVATE $<TARGET_FILE:cleave_core> ${cleave_static_libraries})
  target_link_options(${target} PRIVATE ${cleave_static_link})
endfunction()
