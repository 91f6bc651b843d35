# find_package(cleave COMPONENTS core train). Two export sets: asking for core must not look for
# LibTorch.
include(CMakePackageConfigHelpers)
set(CLEAVE_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/cleave)

install(DIRECTORY include/cleave DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        PATTERN "train" EXCLUDE)
install(TARGETS cleave_core EXPORT cleave_core_targets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT cleave_core_targets NAMESPACE cleave:: DESTINATION ${CLEAVE_CMAKE_DIR})
if(CLEAVE_SHARED)
  install(TARGETS cleave_c EXPORT cleave_c_targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(EXPORT cleave_c_targets NAMESPACE cleave:: DESTINATION ${CLEAVE_CMAKE_DIR})
endif()
if(CLEAVE_TRAIN)
  install(DIRECTORY include/cleave/train DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/cleave)
  install(TARGETS cleave_train EXPORT cleave_train_targets
          ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(EXPORT cleave_train_targets NAMESPACE cleave:: DESTINATION ${CLEAVE_CMAKE_DIR})
endif()
configure_package_config_file(cmake/cleave-config.cmake.in
  ${PROJECT_BINARY_DIR}/cleave-config.cmake INSTALL_DESTINATION ${CLEAVE_CMAKE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/cleave-config-version.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/cleave-config.cmake
              ${PROJECT_BINARY_DIR}/cleave-config-version.cmake cmake/FindPCRE2.cmake
        DESTINATION ${CLEAVE_CMAKE_DIR})

# For C and what else has no CMake. What libcleave.a needs is private where there is a libcleave.so
# that links it already.
file(RELATIVE_PATH cleave_pc_to_prefix /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
set(needs "Requires@: fmt libpcre2-8 libcrypto\nLibs@: -lstdc++ -lm -pthread")
if(CLEAVE_SHARED)
  string(REPLACE "@" ".private" needs "${needs}")
  set(cleave_pc_libs "Libs: -L\${libdir} -lcleave\n${needs}")
else()
  string(REPLACE "Libs@:" "Libs: -L\${libdir} -lcleave" needs "${needs}")
  string(REPLACE "@" "" cleave_pc_libs "${needs}")
endif()
configure_file(cmake/cleave.pc.in ${PROJECT_BINARY_DIR}/cleave.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/cleave.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
