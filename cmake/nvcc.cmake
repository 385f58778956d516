# cmake -DNVCC= -DFLAGS= -DSOURCE= -DOBJECT= -P nvcc.cmake: one CUDA object; fails on ptxas C75xx.
get_filename_component(folder ${OBJECT} DIRECTORY)
file(MAKE_DIRECTORY ${folder})
execute_process(COMMAND ${NVCC} ${FLAGS} -MD -MF ${OBJECT}.d -MT ${OBJECT} -c ${SOURCE} -o ${OBJECT}
                RESULT_VARIABLE status OUTPUT_VARIABLE out ERROR_VARIABLE err)
file(WRITE ${OBJECT}.ptxas.txt "${out}${err}")
if(NOT status EQUAL 0)
  message(FATAL_ERROR "nvcc failed on ${SOURCE}:\n${out}${err}")
endif()
if("${out}${err}" MATCHES "C75[0-9][0-9]")
  string(REGEX MATCH "[^\n]*C75[0-9][0-9][^\n]*" line "${out}${err}")
  file(REMOVE ${OBJECT})
  message(FATAL_ERROR "${SOURCE}: ptxas serialised a wgmma pipeline or dropped setmaxnreg:\n${line}")
endif()
