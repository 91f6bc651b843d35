# Cross-compiles for 64-bit ARM with Debian's g++-aarch64-linux-gnu; what is built runs under qemu-user.
# CLEAVE_ARM64_ROOT is a folder with the libraries as Debian's arm64 packages lay them out
# (usr/lib/aarch64-linux-gnu, usr/include); scripts/check_neon.sh makes one.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64;-L;/usr/aarch64-linux-gnu)

# CMake's trial compilations read this file too, in folders of their own.
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES CLEAVE_ARM64_ROOT)
set(CMAKE_FIND_ROOT_PATH ${CLEAVE_ARM64_ROOT} /usr/aarch64-linux-gnu)
# Where Debian's own compiler looks by itself.
set(CMAKE_C_STANDARD_INCLUDE_DIRECTORIES ${CLEAVE_ARM64_ROOT}/usr/include/aarch64-linux-gnu)
set(CMAKE_CXX_STANDARD_INCLUDE_DIRECTORIES ${CMAKE_C_STANDARD_INCLUDE_DIRECTORIES})
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
