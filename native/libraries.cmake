# All native code but its Python face, as static libraries: the extension and the tests' executable are built on them.
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
# Tests under sanitizers compile what this processor runs, and of engines that touch memory alike the first.
set(SPICERACK_WITHOUT "" CACHE STRING "Instruction sets that are not compiled")

# Results must equal the specification's bit for bit: no fused multiply-adds, no reordered sums.
set(exact -ffp-contract=off -Wall -Wextra)

function(set_options target)
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
  target_compile_options(${target} PRIVATE ${exact} ${ARGN})
endfunction()

# Some sources are compiled once per instruction set, each time in a namespace of its own; quantizers/dispatch.cpp and
# kernels/engines.cpp pick at run time, so one binary runs on every processor of its architecture.
function(add_isa target sources isa)
  if(isa IN_LIST SPICERACK_WITHOUT)
    return()
  endif()
  add_library(${target}_${isa} OBJECT ${sources})
  set_options(${target}_${isa} ${ARGN})
  target_compile_definitions(${target}_${isa} PRIVATE SPICERACK_ISA=${isa})
  target_compile_definitions(${target} PRIVATE SPICERACK_WITH_${isa})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${isa}>)
endfunction()

set(kernels ${CMAKE_CURRENT_LIST_DIR}/kernels)
set(quantizers ${CMAKE_CURRENT_LIST_DIR}/quantizers)
set(engine ${kernels}/linear.cpp ${kernels}/attention.cpp ${kernels}/dense.cpp ${kernels}/norm.cpp ${kernels}/rows.cpp
           ${kernels}/limits.cpp)
set(quantizer ${quantizers}/search.cpp ${quantizers}/superblocks.cpp ${quantizers}/judge.cpp ${quantizers}/fake.cpp)
find_package(Threads REQUIRED)
add_library(kernels STATIC ${kernels}/engines.cpp ${kernels}/layout.cpp ${kernels}/stored.cpp ${kernels}/arena.cpp
            ${kernels}/packed.cpp ${kernels}/plan.cpp ${kernels}/pool.cpp ${kernels}/team.cpp)
set_options(kernels)
target_link_libraries(kernels PUBLIC Threads::Threads ${CMAKE_DL_LIBS})
add_library(quantizers STATIC ${quantizers}/dispatch.cpp ${quantizers}/pack.cpp ${quantizers}/planes.cpp)
set_options(quantizers)
# What takes longest to compile comes first.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(avx2 -mavx2 -mfma -mf16c)
  # GCC 12's own AVX-512 header warns of its deliberately undefined operands.
  set(avx512 -Wno-maybe-uninitialized -Wno-uninitialized -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  add_isa(kernels "${engine}" avx512vbmi ${avx2} ${avx512} -mavx512vnni -mavx512vbmi -mgfni)
  add_isa(kernels "${engine}" avx512vnni ${avx2} ${avx512} -mavx512vnni)
  add_isa(kernels "${engine}" scalar)
  add_isa(kernels "${engine}" avx2 ${avx2})
  add_isa(kernels "${engine}" avxvnni ${avx2} -mavxvnni)
  add_isa(kernels "${engine}" avx512vlvnni ${avx2} ${avx512} -mavx512vnni -mprefer-vector-width=256 -DSPICERACK_256_BITS)
  add_isa(quantizers "${quantizer}" avx512 ${avx512})
  add_isa(quantizers "${quantizer}" avx2 -mavx2)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  add_isa(kernels "${engine}" neon -march=armv8.2-a+dotprod)
  add_isa(kernels "${engine}" scalar)
else()
  add_isa(kernels "${engine}" scalar)
endif()
add_isa(quantizers "${quantizer}" baseline)
