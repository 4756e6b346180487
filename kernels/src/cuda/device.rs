//! One GPU: its stream, its loaded kernels, and matrices in its memory.
//!
//! All work of a device goes to one stream, in the order of the calls; only `download` waits.
//!
//! Invariants:
//!   * a kernel's arguments have the shapes that its `.cu` head names (asserted before the launch)
//!   * matrices live on the device that made them; mixing devices is the caller's mistake

use crate::kernels::AdamW;
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError, result, sys,
};
use std::ffi::{CString, c_void};
use std::sync::Arc;

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// Threads of a block, as the kernels' launch bounds say.
const THREADS: u32 = 256;
/// Most blocks of a kernel that steps over its elements: enough to fill a large GPU.
const BLOCKS_MAX: usize = 4096;

/// A GPU with the kernels loaded. Not shared between threads.
pub struct CudaDevice {
    rms_norm: Kernel,
    swiglu: Kernel,
    adamw: Kernel,
    stream: Arc<CudaStream>,
    name: String,
}

/// `rows x cols` floats in a GPU's memory, without gaps.
pub struct DeviceMatrix {
    data: CudaSlice<f32>,
    rows: usize,
    cols: usize,
}

impl DeviceMatrix {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}

/// A loaded module and the function in it that has its name.
struct Kernel {
    module: sys::CUmodule,
    function: sys::CUfunction,
    context: Arc<CudaContext>,
}

impl Kernel {
    fn load(context: &Arc<CudaContext>, name: &str) -> Result<Kernel, String> {
        let (_, image) =
            MODULES.iter().find(|(stem, _)| *stem == name).expect("each kernel is built in");
        let failed = |fault: DriverError| {
            format!("kernel {name} (built for sm_80 and sm_90a) does not load: {fault}")
        };
        // SAFETY: the image is a whole fatbin made by nvcc, and a context is bound.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(failed)?;
        let symbol = CString::new(name).expect("a kernel's name has no zero byte");
        // SAFETY: the module was loaded just now.
        let function = unsafe { result::module::get_function(module, symbol) }.map_err(failed)?;
        Ok(Kernel { module, function, context: context.clone() })
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // A driver that fails here is going away, and takes the module along.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the module was loaded once and is unloaded once.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}

/// The address of a kernel's argument, as the driver wants it.
fn argument<T>(value: &T) -> *mut c_void {
    (value as *const T).cast_mut().cast()
}

/// Blocks for a kernel that steps over `count` elements.
fn blocks(count: usize) -> u32 {
    count.div_ceil(THREADS as usize).clamp(1, BLOCKS_MAX) as u32
}

impl CudaDevice {
    /// Opens GPU `index` and loads the kernels; `Err` says what is missing.
    pub fn open(index: usize) -> Result<CudaDevice, String> {
        let context = super::context(index)?;
        let failed = |fault: DriverError| format!("cuda device {index} does not open: {fault}");
        let name = context.name().map_err(failed)?;
        Ok(CudaDevice {
            rms_norm: Kernel::load(&context, "rms_norm")?,
            swiglu: Kernel::load(&context, "swiglu")?,
            adamw: Kernel::load(&context, "adamw")?,
            stream: context.default_stream(),
            name: format!("cuda {index} ({name})"),
        })
    }

    /// "cuda 0 (name of the GPU)".
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Copies numbers in, row by row.
    pub fn upload(&self, src: &[f32], rows: usize, cols: usize) -> Result<DeviceMatrix, String> {
        assert_eq!(src.len(), rows * cols, "an upload fills its matrix");
        let data = self.stream.clone_htod(src).map_err(|fault| self.failed("upload", fault))?;
        Ok(DeviceMatrix { data, rows, cols })
    }

    /// A matrix of zeros.
    pub fn zeros(&self, rows: usize, cols: usize) -> Result<DeviceMatrix, String> {
        let data =
            self.stream.alloc_zeros(rows * cols).map_err(|fault| self.failed("allocate", fault))?;
        Ok(DeviceMatrix { data, rows, cols })
    }

    /// Waits for all work so far and copies numbers out.
    pub fn download(&self, src: &DeviceMatrix) -> Result<Vec<f32>, String> {
        let numbers = self.stream.clone_dtoh(&src.data);
        let numbers = numbers.and_then(|numbers| self.stream.synchronize().map(|()| numbers));
        numbers.map_err(|fault| self.failed("download", fault))
    }

    /// As [`Kernels::rms_norm`](crate::Kernels::rms_norm); `kernels/rms_norm.cu`.
    pub fn rms_norm(
        &self,
        x: &DeviceMatrix,
        weight: &DeviceMatrix,
        epsilon: f64,
        y: &mut DeviceMatrix,
        inverse_rms: &mut DeviceMatrix,
    ) -> Result<(), String> {
        assert_eq!(x.shape(), y.shape(), "rms_norm: shape of y");
        assert_eq!(weight.shape(), (1, x.cols), "rms_norm: shape of the weight");
        assert_eq!(inverse_rms.shape(), (x.rows, 1), "rms_norm: shape of inverse_rms");
        let rows = u32::try_from(x.rows).expect("rms_norm: rows fit a grid");
        let cols = i32::try_from(x.cols).expect("rms_norm: columns fit an int");
        let epsilon = epsilon as f32;
        let (x, _x_read) = x.data.device_ptr(&self.stream);
        let (weight, _weight_read) = weight.data.device_ptr(&self.stream);
        let (y, _y_written) = y.data.device_ptr_mut(&self.stream);
        let (inverse_rms, _inverse_written) = inverse_rms.data.device_ptr_mut(&self.stream);
        let mut arguments = [
            argument(&x),
            argument(&weight),
            argument(&y),
            argument(&inverse_rms),
            argument(&cols),
            argument(&epsilon),
        ];
        // SAFETY: types and order are those of rms_norm.cu; shapes were checked above.
        unsafe { self.launch(&self.rms_norm, rows, &mut arguments) }
            .map_err(|fault| self.failed("rms_norm", fault))
    }

    /// As [`Kernels::swiglu`](crate::Kernels::swiglu); `kernels/swiglu.cu`.
    pub fn swiglu(&self, gate_up: &DeviceMatrix, y: &mut DeviceMatrix) -> Result<(), String> {
        assert_eq!(gate_up.shape(), (y.rows, 2 * y.cols), "swiglu: gate left, up right");
        let (rows, width, blocks) = (y.rows as i64, y.cols as i64, blocks(y.rows * y.cols));
        let (gate_up, _gate_up_read) = gate_up.data.device_ptr(&self.stream);
        let (y, _y_written) = y.data.device_ptr_mut(&self.stream);
        let mut arguments = [argument(&gate_up), argument(&y), argument(&rows), argument(&width)];
        // SAFETY: types and order are those of swiglu.cu; shapes were checked above.
        unsafe { self.launch(&self.swiglu, blocks, &mut arguments) }
            .map_err(|fault| self.failed("swiglu", fault))
    }

    /// As [`Kernels::adamw`](crate::Kernels::adamw); `kernels/adamw.cu`.
    pub fn adamw(
        &self,
        update: &AdamW,
        g: &DeviceMatrix,
        w: &mut DeviceMatrix,
        m: &mut DeviceMatrix,
        v: &mut DeviceMatrix,
    ) -> Result<(), String> {
        for other in [&*w, &*m, &*v] {
            assert_eq!(other.shape(), g.shape(), "adamw: shape of an update");
        }
        let (count, blocks) = ((g.rows * g.cols) as i64, blocks(g.rows * g.cols));
        let constants = constants(update);
        let (g, _g_read) = g.data.device_ptr(&self.stream);
        let (w, _w_written) = w.data.device_ptr_mut(&self.stream);
        let (m, _m_written) = m.data.device_ptr_mut(&self.stream);
        let (v, _v_written) = v.data.device_ptr_mut(&self.stream);
        let mut arguments = vec![argument(&g), argument(&w), argument(&m), argument(&v)];
        arguments.push(argument(&count));
        arguments.extend(constants.iter().map(argument));
        // SAFETY: types and order are those of adamw.cu; shapes were checked above.
        unsafe { self.launch(&self.adamw, blocks, &mut arguments) }
            .map_err(|fault| self.failed("adamw", fault))
    }

    /// Puts a kernel on the stream.
    ///
    /// # Safety
    /// `arguments` must point to values of the kernel's parameter types, in order, whose device
    /// pointers stay valid until the stream has passed the kernel.
    unsafe fn launch(
        &self,
        kernel: &Kernel,
        blocks: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DriverError> {
        // A grid of no blocks is an error of the driver's, but no rows are no work.
        if blocks == 0 {
            return Ok(());
        }
        kernel.context.bind_to_thread()?;
        let (grid, block, stream) = ((blocks, 1, 1), (THREADS, 1, 1), self.stream.cu_stream());
        // SAFETY: by this function's contract; memory is freed in stream order after the kernel.
        unsafe { result::launch_kernel(kernel.function, grid, block, 0, stream, arguments) }
    }

    fn failed(&self, what: &str, fault: DriverError) -> String {
        format!("{}: {what}: {fault}", self.name)
    }
}

/// The kernel's last nine parameters: computed in f64, rounded once.
fn constants(update: &AdamW) -> [f32; 9] {
    let steps = update.step as f64;
    let correction1 = 1.0 - update.beta1.powf(steps);
    let correction2 = 1.0 - update.beta2.powf(steps);
    [
        update.gradient_scale,
        update.beta1,
        1.0 - update.beta1,
        update.beta2,
        1.0 - update.beta2,
        update.learning_rate / correction1,
        1.0 / correction2.sqrt(),
        update.epsilon,
        1.0 - update.learning_rate * update.weight_decay,
    ]
    .map(|constant| constant as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_embedded_for_both_architectures() {
        let stems: Vec<&str> = MODULES.iter().map(|(stem, _)| *stem).collect();
        assert_eq!(stems, ["adamw", "rms_norm", "swiglu"]);
        for (stem, image) in MODULES {
            // A fatbin starts with this number, and holds one ELF file per architecture.
            assert_eq!(image[..4], 0xba55_ed50_u32.to_le_bytes(), "{stem} is no fatbin");
            let elves = image.windows(4).filter(|w| w == b"\x7fELF").count();
            assert!(elves >= 2, "{stem} holds machine code for {elves} architectures");
        }
    }

    #[test]
    fn a_step_over_elements_has_blocks_enough_and_not_too_many() {
        assert_eq!([0, 1, 256, 257, 1 << 40].map(blocks), [1, 1, 1, 2, 4096]);
    }
}
