# What this machine can compile, found out before a language is enabled: enabling one that does not work ends CMake, and
# with it the installation of a package that runs without its compiled modules.

# Sets `reason` to why programs of `language` cannot be built here, or to nothing. The attempt is a project of its own.
function(probe_language language reason)
  set(folder ${CMAKE_BINARY_DIR}/probe-${language})
  file(REMOVE_RECURSE ${folder})
  file(WRITE ${folder}/CMakeLists.txt "cmake_minimum_required(VERSION 3.20)\nproject(probe LANGUAGES ${language})\n")
  set(settings "")
  foreach(name CMAKE_MAKE_PROGRAM CMAKE_TOOLCHAIN_FILE CMAKE_${language}_COMPILER CMAKE_${language}_ARCHITECTURES
               CMAKE_${language}_HOST_COMPILER)
    if(${name})
      string(REPLACE ";" "\\;" value "${${name}}")
      list(APPEND settings "-D${name}=${value}")
    endif()
  endforeach()
  execute_process(
    COMMAND ${CMAKE_COMMAND} -S ${folder} -B ${folder}/build -G ${CMAKE_GENERATOR} ${settings}
    RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
  set(found "")
  if(failed)
    set(found "CMake found no working ${language} compiler")
    # the compiler's own complaint, where there is one: "nvcc fatal : Unsupported gpu architecture 'compute_90a'"
    if(said MATCHES "\n *([^\n]*(nvcc fatal|fatal error|error:)[^\n]*)\n")
      string(STRIP "${CMAKE_MATCH_1}" complaint)
      string(APPEND found " (${complaint})")
    endif()
  endif()
  set(${reason} "${found}" PARENT_SCOPE)
endfunction()

# Installs the reason where hra_kernels/backends/compiled.py looks for it.
function(leave_out module reason)
  message(STATUS "hra_kernels: ${module} is not built: ${reason}")
  string(REGEX REPLACE "[\\\"]" "'" reason "${reason}")
  file(WRITE ${CMAKE_BINARY_DIR}/${module}_left_out.py "REASON = \"${reason}\"\n")
  install(FILES ${CMAKE_BINARY_DIR}/${module}_left_out.py DESTINATION hra_kernels)
endfunction()
