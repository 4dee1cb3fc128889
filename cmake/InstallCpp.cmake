# Installs the libraries for C++ programs, their headers and what find_package(bitsandbytes) reads.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(targets bitsandbytes_cpu)
if(TARGET bitsandbytes_gpu)
  list(APPEND targets bitsandbytes_gpu)
endif()
install(TARGETS ${targets} EXPORT bitsandbytes LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/bitsandbytes"
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

set(package "${CMAKE_INSTALL_LIBDIR}/cmake/bitsandbytes")
install(EXPORT bitsandbytes NAMESPACE bitsandbytes:: FILE bitsandbytesConfig.cmake
        DESTINATION ${package})

# The version stands in pyproject.toml only. CMake compares its numbers.
file(STRINGS "${PROJECT_SOURCE_DIR}/pyproject.toml" line REGEX "^version = ")
string(REGEX MATCH "[0-9]+(\\.[0-9]+)*" version "${line}")
write_basic_package_version_file(bitsandbytesConfigVersion.cmake VERSION ${version}
                                 COMPATIBILITY SameMajorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/bitsandbytesConfigVersion.cmake" DESTINATION ${package})
