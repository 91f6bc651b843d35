function(cleave_set_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra
    $<$<BOOL:${CLEAVE_WARNINGS_AS_ERRORS}>:-Werror>)
endfunction()

# What every library of the project has in common. `name` is its exported name (cleave::name).
function(cleave_setup_library target name)
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/src PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${name}
    VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR})
  cleave_set_warnings(${target})
endfunction()

# Nothing of it is seen outside of the library that it becomes part of, but what asks to be
# (CLEAVE_C_API).
function(cleave_hide_symbols target)
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON)
endfunction()
