//! CUDA functions that tch does not offer. They are looked up at run time, so that one binary works with and without
//! CUDA.

use std::ffi::CStr;

/// Loads `libtorch_cuda.so`. The linker does not add it to the binary, because nothing refers to its symbols, but
/// libtorch needs it to find GPUs. Returns whether it was found.
pub fn open_libtorch_cuda() -> bool {
    // SAFETY: dlopen with a constant name; it runs the same initialisers as if the library were linked.
    unsafe { !libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL).is_null() }
}

fn symbol(name: &CStr) -> Option<*mut libc::c_void> {
    // SAFETY: dlsym with a constant name.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

/// Returns the free bytes of the current CUDA device, or None without one.
pub fn free_memory() -> Option<usize> {
    type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> libc::c_int;
    let address = symbol(c"cudaMemGetInfo")?;
    // SAFETY: this is the signature that the CUDA runtime documents for this name.
    let get = unsafe { std::mem::transmute::<*mut libc::c_void, MemGetInfo>(address) };
    let (mut free, mut total) = (0, 0);
    // SAFETY: both pointers are valid for writes.
    (unsafe { get(&mut free, &mut total) } == 0).then_some(free)
}
