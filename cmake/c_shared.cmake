# libcleave.so.<CLEAVE_ABI_VERSION>: the objects of core (which are position-independent and hidden)
# behind the functions of c_api.h and c_dlpack.h. The version script also hides what the standard
# library's templates leave behind. The test c_interface_exports watches the result.
file(STRINGS include/cleave/c_api.h abi_line REGEX "#define CLEAVE_ABI_VERSION")
string(REGEX REPLACE ".* ([0-9]+)$" "\\1" cleave_abi_version "${abi_line}")
get_property(isa_objects GLOBAL PROPERTY cleave_isa_objects)
add_library(cleave_c SHARED $<TARGET_OBJECTS:cleave_core> $<TARGET_OBJECTS:cleave_compute>
            ${isa_objects})
add_library(cleave::c ALIAS cleave_c)
target_include_directories(cleave_c PUBLIC
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_link_libraries(cleave_c PRIVATE Threads::Threads fmt::fmt PCRE2::PCRE2 OpenSSL::Crypto)
set_target_properties(cleave_c PROPERTIES OUTPUT_NAME cleave EXPORT_NAME c LINKER_LANGUAGE CXX
  VERSION ${cleave_abi_version}.${PROJECT_VERSION} SOVERSION ${cleave_abi_version}
  LINK_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/c_shared.map)
target_link_options(cleave_c PRIVATE -Wl,--version-script=${CMAKE_CURRENT_LIST_DIR}/c_shared.map)
