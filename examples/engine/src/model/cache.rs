//! One sequence's keys and values, in chunks that lie in memory exactly as they travel.
//!
//! A chunk is one tensor `[2, layers, tokens, kv_heads * head_dim]` (`KV_2LTD`): first all keys, then all values. The forward
//! pass writes rows into it and reads views of it; handing it to another instance is a copy of its planes, and a chunk that is
//! only partly filled packs to its valid rows, so that no stale byte ever travels.

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};

/// The shape of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    /// Tokens of a full chunk.
    pub(crate) tokens: usize,
    /// `kv_heads * head_dim`.
    pub(crate) width: usize,
}

/// The cache of one sequence.
pub(crate) struct Cache {
    shape: Shape,
    chunks: Vec<Tensor>,
}

impl Shape {
    /// Bytes of a chunk that holds `tokens` tokens.
    pub(crate) fn bytes(&self, tokens: usize) -> usize {
        2 * self.layers * tokens * self.width * size_of::<f32>()
    }
    /// Chunks that `tokens` tokens need.
    pub(crate) fn chunks(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.tokens)
    }
    /// Valid tokens of chunk `i` in a sequence of `len`.
    pub(crate) fn valid(&self, i: usize, len: usize) -> usize {
        len.saturating_sub(i * self.tokens).min(self.tokens)
    }
    fn dims(&self) -> (usize, usize, usize, usize) {
        (2, self.layers, self.tokens, self.width)
    }
}

impl Cache {
    pub(crate) fn new(shape: Shape) -> Self {
        Self { shape, chunks: Vec::new() }
    }

    /// Makes room for `len` tokens. New chunks are zero: what is masked in attention must still be finite.
    pub(crate) fn grow(&mut self, len: usize) -> Result<()> {
        while self.chunks.len() < self.shape.chunks(len) {
            self.chunks.push(Tensor::zeros(self.shape.dims(), DType::F32, &Device::Cpu)?);
        }
        Ok(())
    }

    /// A cache with the same first `len` tokens: full chunks are shared, they are never written again; the last is copied.
    pub(crate) fn fork(&self, len: usize) -> Result<Self> {
        let full = len / self.shape.tokens;
        let mut chunks: Vec<_> = self.chunks.iter().take(full).cloned().collect();
        for partial in self.chunks.iter().skip(full).take(self.shape.chunks(len) - full) {
            chunks.push(partial.copy()?);
        }
        Ok(Self { shape: self.shape, chunks })
    }

    /// Writes keys and values of consecutive tokens from position `start` on; both are `[tokens, width]`, contiguous.
    pub(crate) fn write(&self, layer: usize, start: usize, keys: &Tensor, values: &Tensor) -> Result<()> {
        let (size, len) = (self.shape.tokens, keys.dim(0)?);
        let mut done = 0;
        while done < len {
            let (chunk, at) = ((start + done) / size, (start + done) % size);
            let n = (size - at).min(len - done);
            self.plane(chunk, 0, layer)?.slice_set(&keys.narrow(0, done, n)?, 0, at)?;
            self.plane(chunk, 1, layer)?.slice_set(&values.narrow(0, done, n)?, 0, at)?;
            done += n;
        }
        Ok(())
    }

    /// A view of one layer's keys in a chunk, `[tokens, width]`.
    pub(crate) fn keys(&self, chunk: usize, layer: usize) -> Result<Tensor> {
        self.plane(chunk, 0, layer)
    }
    /// A view of one layer's values in a chunk, `[tokens, width]`.
    pub(crate) fn values(&self, chunk: usize, layer: usize) -> Result<Tensor> {
        self.plane(chunk, 1, layer)
    }
    /// The chunk itself; its valid rows stay as they are once written, so it may be read while the sequence goes on.
    pub(crate) fn chunk(&self, i: usize) -> Result<Tensor> {
        match self.chunks.get(i) {
            Some(chunk) => Ok(chunk.clone()),
            None => bail!("chunk {i} of a cache of {}", self.chunks.len()),
        }
    }
    /// Puts a received chunk (see [`unpack`]) in place; chunks come in order.
    pub(crate) fn push(&mut self, chunk: Tensor) {
        self.chunks.push(chunk);
    }

    fn plane(&self, chunk: usize, which: usize, layer: usize) -> Result<Tensor> {
        self.chunk(chunk)?.get(which)?.get(layer)
    }
}

/// Calls `plane(offset, bytes)` for every run of the first `tokens` tokens of a chunk, in the order in which they travel.
pub(crate) fn pack(
    chunk: &Tensor,
    tokens: usize,
    mut plane: impl FnMut(u64, &[u8]) -> std::result::Result<(), kvxfer::Error>,
) -> Result<()> {
    let (two, layers, size, width) = chunk.dims4()?;
    let (storage, layout) = chunk.storage_and_layout();
    let (Storage::Cpu(CpuStorage::F32(all)), Some((from, to))) = (&*storage, layout.contiguous_offsets())
    else {
        bail!("a chunk that is not contiguous f32 on the CPU");
    };
    let row = tokens * width * size_of::<f32>();
    // A full chunk is one run.
    let (runs, run) = if tokens == size { (1, two * layers * row) } else { (two * layers, row) };
    let floats = run / size_of::<f32>();
    for (i, values) in all[from..to].chunks_exact(two * layers * size * width / runs).enumerate() {
        plane((i * run) as u64, bytemuck::cast_slice(&values[..floats])).map_err(candle_core::Error::wrap)?;
    }
    Ok(())
}

/// Makes a chunk of `shape` out of the packed bytes of its first `tokens` tokens, which `read` copies into the slice it is
/// given; the rest is zero.
pub(crate) fn unpack<E>(
    shape: Shape,
    tokens: usize,
    read: impl FnOnce(&mut [u8]) -> std::result::Result<(), E>,
) -> Result<std::result::Result<Tensor, E>> {
    let row = tokens * shape.width;
    let mut packed = vec![0f32; 2 * shape.layers * row];
    if let Err(e) = read(bytemuck::cast_slice_mut(&mut packed)) {
        return Ok(Err(e));
    }
    let all = if tokens == shape.tokens {
        packed
    } else {
        let mut all = vec![0f32; 2 * shape.layers * shape.tokens * shape.width];
        let planes = all.chunks_exact_mut(shape.tokens * shape.width);
        for (plane, rows) in planes.zip(packed.chunks_exact(row)) {
            plane[..row].copy_from_slice(rows);
        }
        all
    };
    Tensor::from_vec(all, shape.dims(), &Device::Cpu).map(Ok)
}
