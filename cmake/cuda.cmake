# The CUDA part: the backend as plugins, and nibble_cuda_bench. Built when an nvcc of 12.8 or newer is found;
# -DNIBBLE_CUDA=OFF leaves it out, ON makes a missing nvcc an error.
#   libnibble_cuda.so           target cuda:sm_90: sm_90a code only (it has no forward compatibility)
#   libnibble_cuda_portable.so  target cuda:portable: one sm_80 front end, so that every GPU runs the same PTX
# A ptxas message C75xx ("wgmma serialised", "setmaxnreg ignored") fails the build.

# What program and plugin must agree on to the byte: the seam's headers. The program needs the hash
# also where no plugin is built.
set(seam_headers src/ops/backend.h src/ops/calibration_ops.h src/ops/operands.h src/ops/sample_operands.h src/ops/plugin_abi.h
    src/spec/dtype.h src/spec/engine_plan.h src/spec/model_spec.h src/base/error.h)
set(seam_text "")
foreach(header ${seam_headers})
  file(SHA256 ${PROJECT_SOURCE_DIR}/${header} hash)
  string(APPEND seam_text ${hash})
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/${header})
endforeach()
string(SHA256 seam_hash "${seam_text}")
string(SUBSTRING ${seam_hash} 0 16 seam_hash)
set_property(SOURCE ${PROJECT_SOURCE_DIR}/src/build/cuda_plugin.cpp ${PROJECT_SOURCE_DIR}/src/backends/cuda/plugin.cpp
  APPEND PROPERTY COMPILE_DEFINITIONS NIBBLE_SEAM_HASH="${seam_hash}")
target_link_libraries(nibble_build PUBLIC ${CMAKE_DL_LIBS})

set(NIBBLE_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO, ON or OFF")
set_property(CACHE NIBBLE_CUDA PROPERTY STRINGS AUTO ON OFF)

if(NOT NIBBLE_CUDA STREQUAL "OFF")
  find_program(NIBBLE_NVCC nvcc HINTS ${CUDAToolkit_ROOT}/bin ${PROJECT_SOURCE_DIR}/.deps/cuda/nvidia/cu13/bin ENV CUDA_HOME PATH_SUFFIXES bin
               PATHS /usr/local/cuda/bin)
  set(nvcc_version 0)
  if(NIBBLE_NVCC)
    execute_process(COMMAND ${NIBBLE_NVCC} --version OUTPUT_VARIABLE nvcc_text ERROR_QUIET)
    if(nvcc_text MATCHES "release ([0-9]+\\.[0-9]+)")
      set(nvcc_version ${CMAKE_MATCH_1})
    endif()
  endif()
  if(nvcc_version VERSION_LESS 12.8)
    if(NIBBLE_CUDA STREQUAL "ON")
      message(FATAL_ERROR "NIBBLE_CUDA=ON needs nvcc >= 12.8, found \"${NIBBLE_NVCC}\" (${nvcc_version}); "
                          "run scripts/setup --cuda or pass -DNIBBLE_NVCC=/path/to/nvcc")
    endif()
    message(STATUS "CUDA: no nvcc >= 12.8, CPU only")
    return()
  endif()
  message(STATUS "CUDA: ${NIBBLE_NVCC} ${nvcc_version}, sm_90a and portable")

  # NOTE: custom commands, not enable_language(CUDA): CMake 3.25.1 drops CUDA_STANDARD 20, its
  # compiler check fails on the wheel toolkit's lib/lib64, and this way ptxas' words can fail a build.
  set(cuda_flags -std=c++20 -O3 -lineinfo -Xptxas -v -Xcompiler=-fPIC,-fvisibility=hidden
      -I${PROJECT_SOURCE_DIR}/src -I${PROJECT_SOURCE_DIR}/bench/cuda)
  set(hopper_arch -gencode arch=compute_90a,code=sm_90a)
  # sm_80's code runs on 8.6 and 8.9 too; what is not listed compiles the PTX when it is first loaded.
  set(portable_arch -gencode "arch=compute_80,code=[sm_80,sm_90,sm_100,sm_120,compute_80]")
  function(nibble_cuda_object out source variant)  # variant: hopper or portable
    file(RELATIVE_PATH name ${PROJECT_SOURCE_DIR} ${source})
    string(REPLACE "/" "_" name ${name})
    set(flags ${cuda_flags} ${${variant}_arch})
    if(variant STREQUAL "portable")
      string(PREPEND name portable.)
      list(APPEND flags -DNIBBLE_CUDA_PORTABLE)
    endif()
    set(object ${PROJECT_BINARY_DIR}/cuda/${name}.o)
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -DNVCC=${NIBBLE_NVCC} "-DFLAGS=${flags}" -DSOURCE=${source}
              -DOBJECT=${object} -P ${PROJECT_SOURCE_DIR}/cmake/nvcc.cmake
      DEPENDS ${source} ${PROJECT_SOURCE_DIR}/cmake/nvcc.cmake
      DEPFILE ${object}.d
      COMMENT "nvcc ${name}" VERBATIM)
    set(${out} ${object} PARENT_SCOPE)
  endfunction()

  file(GLOB kernel_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/backends/cuda/*.cu)
  file(GLOB only_portable CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/backends/cuda/portable/*.cu)
  file(GLOB bench_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/bench/cuda/*.cu)
  set(kernel_objects)
  foreach(source ${kernel_sources})
    nibble_cuda_object(object ${source} hopper)
    list(APPEND kernel_objects ${object})
  endforeach()
  # The portable plugin has these beside portable/; the other files are made of Hopper's instructions.
  set(portable_objects)
  foreach(name calibration_rounding calibration_statistics elementwise generic_linear generic_rope generic_small runtime sample)
    nibble_cuda_object(object ${PROJECT_SOURCE_DIR}/src/backends/cuda/${name}.cu portable)
    list(APPEND portable_objects ${object})
  endforeach()
  # The bench has both kinds in one program: portable/ exports names of its own.
  set(bench_objects ${kernel_objects})
  foreach(source ${only_portable})
    nibble_cuda_object(object ${source} portable)
    list(APPEND portable_objects ${object})
    list(APPEND bench_objects ${object})
    if(source MATCHES "/attention.cu$")  # serves what Hopper's own attention does not
      list(APPEND kernel_objects ${object})
    endif()
  endforeach()
  foreach(source ${bench_sources})
    nibble_cuda_object(object ${source} hopper)
    list(APPEND bench_objects ${object})
  endforeach()
  add_custom_command(
    OUTPUT ${PROJECT_BINARY_DIR}/nibble_cuda_bench
    COMMAND ${NIBBLE_NVCC} -cudart static ${hopper_arch} ${bench_objects}
            -o ${PROJECT_BINARY_DIR}/nibble_cuda_bench
    DEPENDS ${bench_objects} COMMENT "link nibble_cuda_bench" VERBATIM)
  add_custom_target(cuda_bench ALL DEPENDS ${PROJECT_BINARY_DIR}/nibble_cuda_bench)

  # A plugin: the kernels and the host code that calls them. It brings its own copy of what it
  # needs of base/, exports two functions, and links neither libcuda nor anything of the program.
  function(nibble_cuda_plugin name variant objects)
    set(host nibble_${name}_host)
    set(host_sources src/backends/cuda/blas.cpp src/backends/cuda/cuda_backend.cpp src/backends/cuda/cuda_calibration.cpp
        src/backends/cuda/plugin.cpp src/base/error.cpp src/base/thread_pool.cpp src/spec/dtype.cpp)
    list(TRANSFORM host_sources PREPEND ${PROJECT_SOURCE_DIR}/)
    add_library(${host} OBJECT ${host_sources})
    target_include_directories(${host} PRIVATE ${PROJECT_SOURCE_DIR}/src)
    target_link_libraries(${host} PRIVATE fmt::fmt Boost::json)
    set_target_properties(${host} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden
                          VISIBILITY_INLINES_HIDDEN ON)
    if(variant STREQUAL "portable")
      target_compile_definitions(${host} PRIVATE NIBBLE_CUDA_PORTABLE)
    else()
      target_sources(${host} PRIVATE ${PROJECT_SOURCE_DIR}/src/backends/cuda/tune.cpp)
    endif()
    set(plugin ${PROJECT_BINARY_DIR}/libnibble_${name}.so)
    add_custom_command(
      OUTPUT ${plugin}
      COMMAND ${NIBBLE_NVCC} -shared -cudart static ${${variant}_arch} ${objects}
              $<TARGET_OBJECTS:${host}> -Xlinker $<TARGET_FILE:fmt::fmt> -o ${plugin}
              -Xlinker --version-script=${PROJECT_SOURCE_DIR}/cmake/plugin.map,--no-undefined,--as-needed,-soname=libnibble_${name}.so
      DEPENDS ${objects} ${host} $<TARGET_OBJECTS:${host}> ${PROJECT_SOURCE_DIR}/cmake/plugin.map
      COMMAND_EXPAND_LISTS COMMENT "link libnibble_${name}.so" VERBATIM)
    add_custom_target(${name}_plugin ALL DEPENDS ${plugin})
  endfunction()
  nibble_cuda_plugin(cuda hopper "${kernel_objects}")
  nibble_cuda_plugin(cuda_portable portable "${portable_objects}")
endif()
