# One static library per floor; a floor links only floors below it, as its #includes may only point
# down (scripts/check_includes). Sources are globbed so that a new file needs no edit here.
function(nibble_floor name)
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/${name}/*.cpp)
  string(REPLACE "/" "_" target nibble_${name})
  if(sources)
    add_library(${target} STATIC ${sources})
    set(scope PUBLIC)
  else()
    add_library(${target} INTERFACE)
    set(scope INTERFACE)
  endif()
  target_include_directories(${target} ${scope} ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/include)
  target_link_libraries(${target} ${scope} ${ARGN})
endfunction()

nibble_floor(base fmt::fmt Boost::json PkgConfig::XXHASH Threads::Threads)
nibble_floor(text nibble_base PkgConfig::PCRE2)
nibble_floor(spec nibble_base)
nibble_floor(formats nibble_spec)
nibble_floor(ops nibble_spec)
nibble_floor(model nibble_ops nibble_formats)
nibble_floor(pack nibble_ops nibble_formats)
nibble_floor(backends/reference nibble_ops)
nibble_floor(backends/cpu nibble_ops)
include(${PROJECT_SOURCE_DIR}/cmake/cpu_isa.cmake OPTIONAL)
nibble_floor(bench nibble_pack nibble_backends_cpu)
nibble_floor(engine nibble_model nibble_text)
nibble_floor(build nibble_engine nibble_pack nibble_backends_reference nibble_backends_cpu)
nibble_floor(eval nibble_build)
nibble_floor(quantize nibble_build)
nibble_floor(chat nibble_build nibble_text)
nibble_floor(serve nibble_chat OpenSSL::SSL CURL::libcurl)
nibble_floor(cli nibble_quantize nibble_eval nibble_serve nibble_bench PkgConfig::LIBEDIT)

if(EXISTS ${PROJECT_SOURCE_DIR}/src/cli/main.cpp)
  add_executable(nibble $<TARGET_OBJECTS:nibble_cli>)
  target_link_libraries(nibble PRIVATE nibble_cli)
  set_target_properties(nibble PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR})
endif()

# The specification runs whole evaluation texts; let the compiler vectorize its plain loops.
set_property(SOURCE ${PROJECT_SOURCE_DIR}/src/backends/reference/reference_backend.cpp APPEND PROPERTY COMPILE_OPTIONS -O3)

# The built-in calibration texts are assembled into the binary.
set_property(SOURCE ${PROJECT_SOURCE_DIR}/src/cli/builtin_calibration.cpp APPEND PROPERTY COMPILE_DEFINITIONS
  NIBBLE_CALIBRATION_FILE="${PROJECT_SOURCE_DIR}/models/texts/calib.jsonl")
set_property(SOURCE ${PROJECT_SOURCE_DIR}/src/cli/builtin_calibration.cpp APPEND PROPERTY OBJECT_DEPENDS
  ${PROJECT_SOURCE_DIR}/models/texts/calib.jsonl)
# The quantizer's searches are plain loops over floats too; its reductions say so with "omp simd".
target_compile_options(nibble_quantize PRIVATE -O3 -fopenmp-simd)

# So are the files of the chat page.
set(web_dir ${PROJECT_SOURCE_DIR}/src/serve/web)
set_property(SOURCE ${PROJECT_SOURCE_DIR}/src/serve/web_page.cpp APPEND PROPERTY COMPILE_DEFINITIONS
  NIBBLE_WEB_DIR="${web_dir}")
set_property(SOURCE ${PROJECT_SOURCE_DIR}/src/serve/web_page.cpp APPEND PROPERTY OBJECT_DEPENDS
  "${web_dir}/index.html;${web_dir}/app.js;${web_dir}/style.css;${web_dir}/openapi.json")

# Asio has a fence that TSan does not model; its queues are mutexes where it matters to us (one I/O thread).
if(NIBBLE_SANITIZE MATCHES "thread" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set_property(SOURCE ${PROJECT_SOURCE_DIR}/src/serve/http_server.cpp APPEND PROPERTY COMPILE_OPTIONS -Wno-tsan)
endif()
