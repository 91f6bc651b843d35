# find_package(cleave COMPONENTS core train). Two export sets: asking for core must not look for
# LibTorch.
include(CMakePackageConfigHelpers)
set(CLEAVE_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/cleave)

install(DIRECTORY include/cleave DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        PATTERN "train" EXCLUDE)
install(TARGETS cleave_core EXPORT cleave_core_targets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT cleave_core_targets NAMESPACE cleave:: DESTINATION ${CLEAVE_CMAKE_DIR})
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
