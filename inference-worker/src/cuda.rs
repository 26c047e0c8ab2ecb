//! The little of CUDA that tch does not offer, looked up at run time so that one binary serves CPU and GPU.

use std::ffi::CStr;

/// Opens `libtorch_cuda.so` where it is. The linker leaves it out of the binary (nothing refers to it by
/// name), and without it libtorch sees no GPU. Returns whether it was found.
pub fn open_libtorch_cuda() -> bool {
    // SAFETY: dlopen with a constant name; libtorch's own initialisers run, as they would when linked.
    unsafe { !libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL).is_null() }
}

fn symbol(name: &CStr) -> Option<*mut libc::c_void> {
    // SAFETY: a look-up by constant name.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

/// Free bytes on the current CUDA device, or None without one.
pub fn free_memory() -> Option<usize> {
    type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> libc::c_int;
    let address = symbol(c"cudaMemGetInfo")?;
    // SAFETY: the CUDA runtime documents exactly this signature under this name.
    let get = unsafe { std::mem::transmute::<*mut libc::c_void, MemGetInfo>(address) };
    let (mut free, mut total) = (0, 0);
    // SAFETY: both pointers are valid for writes.
    (unsafe { get(&mut free, &mut total) } == 0).then_some(free)
}
