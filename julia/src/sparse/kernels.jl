# Activations are held in panels: for each feature, the values of some samples next to each other, so that a kept weight
# is one broadcast and as many vector operations as the samples take. A panel of V vectors is V * LANES samples wide;
# LLVM splits the vectors where the processor has shorter ones.
const LANES = 16
const Lane = Vec{LANES,Float32}
const MAX_VECTORS = 4

const AVX512 = CPUID.test_cpu_feature(CPUID.JL_X86_avx512f)

"""
Outputs that a sparse layer computes at once, so that their sums do not wait for each other and their weights take few loads: LOW
of panels of MAX_VECTORS and of windows next to each other, HIGH of panels half as wide. Then all sums are in registers.
"""
const LOW, HIGH = AVX512 ? (4, 8) : (1, 1)

"""
Vectors in the widest panel for inference. Twice as many inputs of a panel half as wide stay in the fastest cache, so that sums
are read and written half as often. Training has wide ones for its gradients of weights, which are sums over samples.
"""
const PANEL_VECTORS = AVX512 ? MAX_VECTORS ÷ 2 : MAX_VECTORS

"""
Inputs in a block: their values of a panel stay in the fastest cache while the weights of all outputs pass over them. With few
weights, when sums are read and written again for few products, longer blocks are faster.
"""
block_size(inputs, kept, height) = even_blocks(inputs, height > LOW ? 256 : count(kept) > 0.15 * length(kept) ? 160 : 208)
even_blocks(inputs, most) = cld(inputs, cld(inputs, most))

"The vectors of inputs, at most, that stay in the fastest cache when windows next to each other are computed."
const BLOCK_VECTORS = 500

"Outputs that a dense layer computes at once, as many as registers hold: 24 vectors of AVX-512's 32."
const GROUP = AVX512 ? 6 : 1

"""
    SparseKernel{H}(W, mask, bias, relu)

The kept weights of a layer for panels, block of inputs by block, so that the work is proportional to their number. Within a
block, outputs are in the order of their number of weights, and in chunks of H: the first weight of each, the second of
each, and so on (SELL-C-σ; Kreutzer et al., 2014, "A unified sparse matrix data format for efficient general sparse matrix-vector
multiplication on modern processors with wide SIMD units"), and then those that some have more than the first of the chunk.
Outputs too few for a chunk come in chunks of 4, or one by one. Loops of one length after another are predicted well. `relu` is
fused.

Made of a weight, a kernel has no such remainders: where an output has fewer weights than others of its chunk, some that are
pruned, and zero, count as kept.
"""
struct SparseKernel{H,C<:Integer}
    inputs::Int
    outputs::Int
    relu::Bool
    bias::Vector{Float32}
    block::Int # inputs of each but the last
    blocks::Vector{Int} # where in `rows` each begins, and the end
    rows::Vector{Int32} # outputs, from 0
    counts::Vector{Int32} # of their weights in the block
    columns::Vector{C} # inputs in the block, from 0, or how far they are from where windows begin
    values::Vector{Float32}
end

function SparseKernel{H}(W, mask, bias, relu, block = block_size(size(W, 2), mask, H)) where {H}
    kept = even_chunks!(permutedims(mask), block, Val(H))
    kernel, places = packed(SparseKernel{H}, kept, (size(W, 1), 1), bias, relu, block)
    kernel.values .= view(W, places) .* view(mask, places)
    return kernel
end

"""
A kernel with weights yet to be filled in, and where in the weight's memory each has its place. `kept`, of size (inputs,
outputs), is `true` where weights are, and `strides` are the distances in that memory from one input, and from one output,
to the next.
"""
function packed(::Type{SparseKernel{H}}, kept, strides, bias, relu, block = block_size(size(kept, 1), kept, H)) where {H}
    inputs, outputs = size(kept)
    n = count(kept)
    blocks, rows, counts = Int[1], Int32[], Int32[]
    columns, places = Vector{UInt8}(undef, n), Vector{Int32}(undef, n)
    found = Matrix{UInt8}(undef, block + 1, H)
    k = 0
    for start in 1:block:inputs
        stop = min(start + block - 1, inputs)
        numbers, order = by_number(kept, start, stop)
        append!(rows, order .- 1)
        append!(counts, @view numbers[order])
        k = over_chunks(k, 1, length(order), Val(H)) do k, at, height
            chunk = ntuple(c -> order[at + c - 1], height)
            for (c, i) in enumerate(chunk)
                find!(view(found, :, c), view(kept, start:stop, i))
            end
            put(k, m, c) = (columns[k] = found[m, c];
                            places[k] = (start - 1 + found[m, c]) * strides[1] + (chunk[c] - 1) * strides[2] + 1)
            return each_of_chunk(put, k, map(i -> numbers[i], chunk))
        end
        push!(blocks, length(rows) + 1)
    end
    return SparseKernel{H,UInt8}(inputs, outputs, relu, bias, block, blocks, rows, counts, columns, zeros(Float32, n)), places
end

"How many weights outputs have in a block, and the outputs that it computes, in this order."
function by_number(kept, start, stop)
    numbers = vec(count(view(kept, start:stop, :); dims = 1))
    # In the first block outputs get their bias, in the last their activation.
    return numbers, filter(i -> numbers[i] > 0 || start == 1 || stop == size(kept, 1), sortperm(numbers))
end

"Mark more weights as kept, so that outputs of a chunk have equally many."
function even_chunks!(kept, block, height)
    for start in 1:block:size(kept, 1)
        stop = min(start + block - 1, size(kept, 1))
        numbers, order = by_number(kept, start, stop)
        over_chunks(nothing, 1, length(order), height) do _, at, height
            chunk = ntuple(c -> order[at + c - 1], height)
            foreach(i -> keep_more!(view(kept, start:stop, i), numbers[last(chunk)] - numbers[i]), chunk)
        end
    end
    return kept
end

function keep_more!(kept, n)
    for i in eachindex(kept)
        n == 0 && return
        kept[i] || (kept[i] = true; n -= 1)
    end
end

"""
Call `f` for the chunks of the outputs from the `i`-th to the `last`, of H at most: with `state`, or what it returned for the one
before, where the chunk begins, and a `Val` of its number of outputs.
"""
@inline function over_chunks(f, state, i, last, ::Val{H}) where {H}
    while i + H - 1 <= last
        state = f(state, i, Val(H))
        i += H
    end
    return H == 1 ? state : over_chunks(f, state, i, last, Val(H == 8 ? 4 : 1))
end

"Call `put` for the weights of a chunk, the next after `k` others: with number, place among those of its output, and output."
function each_of_chunk(put, k, numbers)
    for m in 1:first(numbers), c in eachindex(numbers)
        put(k += 1, m, c)
    end
    for c in eachindex(numbers), m in (first(numbers) + 1):numbers[c]
        put(k += 1, m, c)
    end
    return k
end

"Write to `found` the places, from 0, of what is kept."
function find!(found, kept)
    m = 1
    @inbounds for j in eachindex(kept) # written first and kept or not after, as which are kept cannot be predicted
        found[m] = (j - 1) % UInt8
        m += kept[j]
    end
end

"""
Samples as they were given, column-major (features, samples). A sparse kernel takes them block by block of features,
transposed into `block`, which so stays in the fastest cache.
"""
mutable struct Rows
    const from::Ptr{Float32}
    const features::Int
    const samples::Int
    const block::Ptr{Float32}
    finite::Bool
end

"The inputs of a panel from `start` on, as many as a block has."
block(x::Matrix, start, size, ::Val{V}) where {V} = pointer(x) + start * V * sizeof(Lane)
block(x::Ptr, start, size, width) = x # columns say how far inputs of all blocks are from it

function block(x::Rows, start, size, ::Val{V}) where {V}
    x.finite &= transpose_into!(x.block, V * LANES, x.from + start * sizeof(Float32), x.features,
                                min(size, x.features - start), x.samples)
    return x.block
end

inputs(kernel::SparseKernel) = kernel.inputs
outputs(kernel::SparseKernel) = kernel.outputs

"`y = W * x .+ bias` and the fused activation for panels of V vectors: `x` is (samples, inputs), `y` (samples, outputs)."
function multiply!(y::Matrix{Float32}, x::Union{Matrix{Float32},Rows}, kernel::SparseKernel, width::Val)
    GC.@preserve x y kernel multiply_blocks!(pointer(y), width, x, width, kernel, width, SideBySide())
    return y
end

function multiply_blocks!(y, between_outputs, x, between_inputs, kernel, width, layout)
    kept, k, n = Kept(kernel.columns, kernel.values), 0, length(kernel.blocks) - 1
    lanes = lane_numbers(kernel, width)
    for b in 1:n
        input = block(x, (b - 1) * kernel.block, kernel.block, width)
        bias = b == 1 ? pointer(kernel.bias) : C_NULL
        k = over_block(multiply_rows!, k, kernel, b, kept, lanes, y, between_outputs, input, between_inputs, bias,
                       kernel.relu && b == n, width, layout)
    end
    return nothing
end

"""
How the vectors of inputs are placed that a weight is multiplied with: the V of a place side by side, and those of the next place
`step` places on.
"""
struct Apart{V,step} end
const SideBySide = Apart{1,1}
Apart(V, step) = step == 1 ? SideBySide() : Apart{V,step}()

"Where the `v`-th vector is, in bytes after the first."
@inline place(::Apart{V,step}, v) where {V,step} = ((v - 1) ÷ V * V * step + (v - 1) % V) * sizeof(Lane)

"Where a kernel's kept weights are, or something else that each has."
struct Kept{C}
    columns::Ptr{C}
    values::Ptr{Float32}
end
Kept(columns::Vector, values) = Kept(pointer(columns), pointer(values))
columns_after((; columns)::Kept{C}, k) where {C} = columns + k * sizeof(C)
values_after((; values), k) = values + k * sizeof(Float32)

"Call `f` for the outputs of a block, a chunk at a time: with the number of weights before it, which it returns for the next."
@inline function over_block(f, k, kernel::SparseKernel{H}, b, arguments...) where {H}
    rows, counts = pointer(kernel.rows), pointer(kernel.counts)
    return over_chunks(k, kernel.blocks[b], kernel.blocks[b + 1] - 1, Val(H)) do k, r, height
        @inline
        f(k, chunk(rows + (r - 1) * sizeof(Int32), counts + (r - 1) * sizeof(Int32), height), arguments...)
    end
end

"Where the N outputs of a chunk, and the numbers of their weights, are."
struct Chunk{N}
    rows::Ptr{Int32}
    counts::Ptr{Int32}
end
chunk(rows, counts, ::Val{N}) where {N} = Chunk{N}(rows, counts)
@inline row(chunk, c) = unsafe_load(chunk.rows, c) % Int
@inline weights_of(chunk, c) = unsafe_load(chunk.counts, c) % Int

@inline function multiply_rows!(k, chunk::Chunk{N}, kept, lanes, y, between_outputs, x, between_inputs, bias, relu, width,
                                layout) where {N}
    rows, n = ntuple(c -> row(chunk, c), Val(N)), weights_of(chunk, 1)
    sums = bias == C_NULL ? map(i -> (@inline; load(y + distance(i, between_outputs), width)), rows) :
           map(i -> (@inline; ntuple(Returns(Lane(unsafe_load(bias, i + 1))), width)), rows)
    for _ in 1:n
        weights, inputs = load_weights(values_after(kept, k), lanes, Val(N)), inputs_after(kept, k, Val(N), x, between_inputs)
        sums = map((row, w, input) -> (@inline; add_product(row, w, input, layout)), sums, weights, inputs)
        k += N
    end
    others = N <= LOW && weights_of(chunk, N) > n # HIGH chunks are even
    relu && !others && (sums = map(row -> (@inline; map(s -> max(s, zero(s)), row)), sums))
    map((i, row) -> (@inline; store!(y + distance(i, between_outputs), row, width)), rows, sums)
    return others ? multiply_others!(k, chunk, kept, y, between_outputs, x, between_inputs, relu, width, layout) : k
end

"Add the products of the weights that outputs of a chunk have more than its first."
@noinline function multiply_others!(k, chunk::Chunk{N}, kept, y, between_outputs, x, between_inputs, relu, width, layout) where {N}
    for c in 1:N
        output = y + distance(row(chunk, c), between_outputs)
        sums = load(output, width)
        for _ in 1:(weights_of(chunk, c) - weights_of(chunk, 1))
            (input,) = inputs_after(kept, k, Val(1), x, between_inputs)
            sums = add_product(sums, Lane(unsafe_load(values_after(kept, k))), input, layout)
            k += 1
        end
        store!(output, relu ? map(s -> max(s, zero(s)), sums) : sums, width)
    end
    return k
end

bytes(::Val{V}) where {V} = V * sizeof(Lane)
"How far apart features are, in bytes, when neighbours are so many apart, or what a panel of V vectors takes."
distance(features, between) = features * between
distance(features, width::Val) = features * bytes(width)

"Where the inputs of the next weights are."
@inline inputs_after(kept, k, n, x, between) =
    map(column -> x + distance(column, between), load_columns(columns_after(kept, k), n))

# In few loads: loads, of which a product needs as many as it has vectors, are what limits the kernel.
@inline function load_weights(p, lanes, ::Val{N}) where {N}
    (N == 1 || isnothing(lanes)) && return ntuple(c -> Lane(unsafe_load(p, c)), Val(N))
    weights = shufflevector(vload(Vec{N,Float32}, p), Val(ntuple(i -> i <= N ? i - 1 : :undef, Val(LANES))))
    return ntuple(c -> (@inline; permuted(weights, lanes[c])), Val(N))
end

"""
The numbers of the first H lanes, for `load_weights`, if it loads weights together and then spreads them. LLVM is not told which
they are, as it would load each weight again instead. Many sums leave no registers for them.
"""
lane_numbers(::SparseKernel{H}, ::Val{V}) where {H,V} =
    H > 1 && H * (V + 1) <= 24 ? ntuple(c -> unknown(Vec{LANES,Int32}(c - 1)), Val(H)) : nothing
@inline unknown(v::Vec{LANES,Int32}) = Vec(Base.llvmcall(
    """
    %2 = call <16 x i32> asm "", "=v,0"(<16 x i32> %0)
    ret <16 x i32> %2
    """, Registers{Int32}, Tuple{Registers{Int32}}, v.data))
const Registers{T} = NTuple{LANES,VecElement{T}}
@inline permuted(v::Lane, places) = Vec(ccall("llvm.x86.avx512.permvar.sf.512", llvmcall, Registers{Float32},
                                              (Registers{Float32}, Registers{Int32}), v.data, places.data))

@inline load_columns(p, ::Val{1}) = (unsafe_load(p) % Int,)
@inline load_columns(p::Ptr{UInt8}, ::Val{4}) =
    (all = ltoh(unsafe_load(Ptr{UInt32}(p))) % Int; (all & 0xff, all >> 8 & 0xff, all >> 16 & 0xff, all >> 24))
@inline load_columns(p::Ptr{UInt8}, ::Val{8}) =
    (all = ltoh(unsafe_load(Ptr{UInt64}(p))); ntuple(c -> (all >> (8c - 8) & 0xff) % Int, Val(8)))
@inline load_columns(p::Ptr{Int32}, ::Val{4}) = (load_columns(p)..., load_columns(p + 2sizeof(Int32))...)
@inline load_columns(p::Ptr{Int32}) = (both = ltoh(unsafe_load(Ptr{UInt64}(p))); (both % Int & 0xffffffff, (both >> 32) % Int))

@inline add_product(sums::NTuple{N}, w, x, layout) where {N} =
    ntuple(v -> (@inline; muladd(w, vload(Lane, x + place(layout, v)), sums[v])), Val(N))
@inline load(p, ::Val{V}, stride = sizeof(Lane)) where {V} = ntuple(v -> vload(Lane, p + (v - 1) * stride), Val(V))
@inline load(p, ::Val{N}, layout::Apart) where {N} = ntuple(v -> (@inline; vload(Lane, p + place(layout, v))), Val(N))
@inline store!(p, vectors, ::Val{V}, stride = sizeof(Lane)) where {V} =
    ntuple(v -> (vstore(vectors[v], p + (v - 1) * stride); nothing), Val(V))

"Add to `slopes`, in the order of the kernel's weights, the products `dy * x'` where weights are kept; panels as in `multiply!`."
function add_slopes!(slopes, dy::Matrix{Float32}, x::Matrix{Float32}, kernel::SparseKernel, width::Val)
    GC.@preserve slopes dy x kernel begin
        kept, k = Kept(kernel.columns, slopes), 0
        for b in 1:(length(kernel.blocks) - 1)
            input = block(x, (b - 1) * kernel.block, kernel.block, width)
            k = over_block(add_slopes_of_rows!, k, kernel, b, kept, pointer(dy), input, width)
        end
    end
    return slopes
end

@inline function add_slopes_of_rows!(k, chunk::Chunk{N}, kept, dy, x, width) where {N}
    n = weights_of(chunk, 1)
    delta(c) = load(dy + row(chunk, c) * bytes(width), width)
    N == 1 && return add_slopes_of_row!(k, n, kept, delta(1), x, width)
    deltas = ntuple(delta, Val(N))
    for _ in 1:n
        k = add_next_slopes!(k, kept, deltas, x, width)
    end
    for c in 2:N
        others = weights_of(chunk, c) - n
        others > 0 && (k = add_slopes_of_row!(k, others, kept, delta(c), x, width))
    end
    return k
end

# Four at a time, as sums over vectors take long.
@inline function add_slopes_of_row!(k, n, kept, delta, x, width)
    for _ in 1:(n >> 2)
        k = add_next_slopes!(k, kept, (delta, delta, delta, delta), x, width)
    end
    for _ in 1:(n & 3)
        k = add_next_slopes!(k, kept, (delta,), x, width)
    end
    return k
end

@inline function add_next_slopes!(k, kept, deltas::NTuple{N}, x, width) where {N}
    inputs = inputs_after(kept, k, Val(N), x, width)
    add_sums!(values_after(kept, k), map(product, deltas, inputs))
    return k + N
end

@inline add_sums!(p, products::NTuple{4}) = vstore(vload(Vec{4,Float32}, p) + sums(products...), p)
@inline add_sums!(p, (product,)::Tuple{Any}) = unsafe_store!(p, unsafe_load(p) + sum(product))

@inline function product(row, input)
    sums = row[1] * vload(Lane, input)
    for v in 2:length(row)
        sums = muladd(row[v], vload(Lane, input + (v - 1) * sizeof(Lane)), sums)
    end
    return sums
end

"The sums of four vectors."
@inline function sums(a, b, c, d)
    (ab1, ab2), (cd1, cd2) = interleaved(a, b), interleaved(c, d)
    ab, cd = ab1 + ab2, cd1 + cd2
    quarters = quarterwise(ab, cd, Val((0, 1, 16, 17))) + quarterwise(ab, cd, Val((2, 3, 18, 19)))
    halves = shufflevector(quarters, Val(ntuple(i -> i - 1, Val(8)))) + shufflevector(quarters, Val(ntuple(i -> i + 7, Val(8))))
    return shufflevector(halves, Val((0, 1, 2, 3))) + shufflevector(halves, Val((4, 5, 6, 7)))
end

"""
    transpose_into!(to, to_stride, from, from_stride, rows, columns) -> Bool

Write the transpose of the column-major (rows, columns) matrix at the pointer `from` to `to`; strides are the distances
between columns. Returns whether all values are finite.
"""
function transpose_into!(to, to_stride, from, from_stride, rows, columns)
    tiled_rows, tiled_columns = rows - rows % 4, columns - columns % LANES
    zeros, one_by_one = zero(Lane), 0.0f0 # NaN once a value was not finite
    for j in 0:LANES:(tiled_columns - 1), i in 0:4:(tiled_rows - 1)
        tile = tile_of_rows(from + 4 * (i + j * from_stride), 4 * from_stride)
        zeros = sum_of_zeros(zeros, tile)
        store!(to + 4 * (j + i * to_stride), tile, Val(4), 4 * to_stride)
    end
    long_rows, long_columns = rows - rows % LANES, columns - (columns - tiled_columns) % 4
    for j in tiled_columns:4:(long_columns - 1), i in 0:LANES:(long_rows - 1)
        tile = transposed_quarters(load(from + 4 * (i + j * from_stride), Val(4), 4 * from_stride)...)
        zeros = sum_of_zeros(zeros, tile)
        store_quarters!(to + 4 * (j + i * to_stride), tile, 4 * to_stride)
    end
    for j in 0:(columns - 1), i in (j < tiled_columns ? tiled_rows : j < long_columns ? long_rows : 0):(rows - 1)
        value = unsafe_load(from + 4 * (i + j * from_stride))
        one_by_one = muladd(value, 0.0f0, one_by_one)
        unsafe_store!(to + 4 * (j + i * to_stride), value)
    end
    return sum(zeros) + one_by_one == 0
end

@inline sum_of_zeros(zeros, (a, b, c, d)) =
    zeros + (muladd(a, zero(a), b * zero(a)) + muladd(c, zero(a), d * zero(a)))

"""
Four rows of LANES columns, from columns of four values each: column 4i + k goes to the i-th quarter of the k-th vector,
where loads can put it, so that what is left are transpositions of 4 × 4 within each quarter.
"""
@inline tile_of_rows(p, stride) = transposed_quarters(quarters(p, 4stride), quarters(p + stride, 4stride),
                                                      quarters(p + 2stride, 4stride), quarters(p + 3stride, 4stride))

@inline function transposed_quarters(a, b, c, d)
    ab, cd = interleaved(a, b), interleaved(c, d)
    return (quarterwise(ab[1], cd[1], Val((0, 1, 16, 17))), quarterwise(ab[1], cd[1], Val((2, 3, 18, 19))),
            quarterwise(ab[2], cd[2], Val((0, 1, 16, 17))), quarterwise(ab[2], cd[2], Val((2, 3, 18, 19))))
end

@inline quarters(p, stride) = joined(joined(quarter(p), quarter(p + stride)), joined(quarter(p + 2stride), quarter(p + 3stride)))
@inline quarter(p) = vload(Vec{4,Float32}, p)
@inline store_quarters!(p, vectors, stride) = ntuple(Val(LANES)) do row
    @inline
    vstore(nth_quarter(vectors[(row - 1) % 4 + 1], Val((row - 1) ÷ 4)), p + (row - 1) * stride)
    return nothing
end
@inline nth_quarter(vector, ::Val{q}) where {q} = shufflevector(vector, Val(ntuple(i -> 4q + i - 1, Val(4))))
@inline joined(a::Vec{N}, b::Vec{N}) where {N} = shufflevector(a, b, Val(ntuple(i -> i - 1, Val(2N))))
@inline interleaved(a, b) = quarterwise(a, b, Val((0, 16, 1, 17))), quarterwise(a, b, Val((2, 18, 3, 19)))
@inline quarterwise(a, b, ::Val{lanes}) where {lanes} =
    shufflevector(a, b, Val(ntuple(i -> lanes[(i - 1) % 4 + 1] + 4 * ((i - 1) ÷ 4), Val(LANES))))
