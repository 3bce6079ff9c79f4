# Activations are held in panels: for each feature, the values of some samples next to each other, so that a kept weight
# is one broadcast and as many vector operations as the samples take. A panel of V vectors is V * LANES samples wide;
# LLVM splits the vectors where the processor has shorter ones.
const LANES = 16
const Lane = Vec{LANES,Float32}
const MAX_VECTORS = 4

"""
Inputs, at most, whose values of a panel stay in the fastest cache while the weights of all outputs pass over them. With few
weights, when sums are read and written again for few products, longer blocks are faster.
"""
block_size(density) = density > 0.15 ? 160 : 208
"The vectors of inputs, at most, that stay in the fastest cache when windows next to each other are computed."
const BLOCK_VECTORS = 500

"Outputs that a dense layer computes at once, as many as registers hold: 24 vectors of AVX-512's 32."
const GROUP = CPUID.test_cpu_feature(CPUID.JL_X86_avx512f) ? 6 : 1

"Outputs that a sparse layer computes at once, so that their sums do not wait for each other and their weights take few loads."
const CHUNK_HEIGHT = CPUID.test_cpu_feature(CPUID.JL_X86_avx512f) ? 4 : 1

"""
    SparseKernel(W, mask, bias, relu)

The kept weights of a layer for panels, block of inputs by block, so that the work is proportional to their number. Within a
block, outputs are in the order of their number of weights, and in chunks of CHUNK_HEIGHT: the first weight of each, the second of
each, and so on (SELL-C-σ; Kreutzer et al., 2014, "A unified sparse matrix data format for efficient general sparse matrix-vector
multiplication on modern processors with wide SIMD units"), and then, instead of padding, those that some have more than the
first of the chunk. Outputs too few for a chunk come one by one. Loops of one length after another are predicted well. `relu` is
fused.
"""
struct SparseKernel{C<:Integer}
    inputs::Int
    outputs::Int
    relu::Bool
    bias::Vector{Float32}
    block::Int # inputs of each but the last
    blocks::Vector{Int} # where in `rows` each begins, and the end
    singles::Vector{Int} # where in `rows` those one by one begin
    rows::Vector{Int32} # outputs, from 0
    counts::Vector{Int32} # of their weights in the block
    columns::Vector{C} # inputs in the block, from 0, or how far they are from where windows begin
    values::Vector{Float32}
end

function SparseKernel(W, mask, bias, relu)
    kernel, places = packed(permutedims(mask), (size(W, 1), 1), bias, relu)
    kernel.values .= @view W[places]
    return kernel
end

"""
A kernel with weights yet to be filled in, and where in the weight's memory each has its place. `kept`, of size (inputs,
outputs), is `true` where weights are, and `strides` are the distances in that memory from one input, and from one output,
to the next. Blocks have at most `most` inputs.
"""
function packed(kept, strides, bias, relu, most = block_size(count(kept) / length(kept)))
    inputs, outputs = size(kept)
    n = count(kept)
    block = cld(inputs, cld(inputs, most))
    blocks, singles, rows, counts = Int[1], Int[], Int32[], Int32[]
    columns, places = Vector{UInt8}(undef, n), Vector{Int32}(undef, n)
    found = Matrix{UInt8}(undef, block + 1, CHUNK_HEIGHT)
    k = 0
    for start in 1:block:inputs
        stop = min(start + block - 1, inputs)
        numbers = [count(view(kept, start:stop, i)) for i in 1:outputs]
        # In the first block outputs get their bias, in the last their activation.
        order = filter(i -> numbers[i] > 0 || start == 1 || stop == inputs, sortperm(numbers))
        whole = length(order) - length(order) % CHUNK_HEIGHT
        push!(singles, length(rows) + 1 + whole)
        append!(rows, order .- 1)
        append!(counts, @view numbers[order])
        chunks = [[order[i:(i + CHUNK_HEIGHT - 1)] for i in 1:CHUNK_HEIGHT:whole]; [[i] for i in order[(whole + 1):end]]]
        for chunk in chunks
            for (c, i) in enumerate(chunk)
                find!(view(found, :, c), view(kept, start:stop, i))
            end
            put(k, m, c) = (columns[k] = found[m, c];
                            places[k] = (start - 1 + found[m, c]) * strides[1] + (chunk[c] - 1) * strides[2] + 1)
            k = each_of_chunk(put, k, view(numbers, chunk))
        end
        push!(blocks, length(rows) + 1)
    end
    kernel = SparseKernel(inputs, outputs, relu, bias, block, blocks, singles, rows, counts, columns, zeros(Float32, n))
    return kernel, places
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

function block(x::Rows, start, size, ::Val{V}) where {V}
    x.finite &= transpose_into!(x.block, V * LANES, x.from + start * sizeof(Float32), x.features,
                                min(size, x.features - start), x.samples)
    return x.block
end

inputs(kernel::SparseKernel) = kernel.inputs
outputs(kernel::SparseKernel) = kernel.outputs

"`y = W * x .+ bias` and the fused activation for panels of V vectors: `x` is (samples, inputs), `y` (samples, outputs)."
function multiply!(y::Matrix{Float32}, x::Union{Matrix{Float32},Rows}, kernel::SparseKernel, width::Val)
    GC.@preserve x y kernel begin
        at, n = NextWeights(pointer(kernel.columns), pointer(kernel.values)), length(kernel.singles)
        for b in 1:n
            input = block(x, (b - 1) * kernel.block, kernel.block, width)
            bias = b == 1 ? pointer(kernel.bias) : C_NULL
            at = over_block(multiply_rows!, at, kernel, b, pointer(y), bytes(width), input, bytes(width), bias,
                            kernel.relu && b == n, width, SideBySide())
        end
    end
    return y
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

"Where a kernel's next weights are."
struct NextWeights{C}
    columns::Ptr{C}
    values::Ptr{Float32}
end
after(at::NextWeights{C}, n) where {C} = NextWeights(at.columns + n * sizeof(C), at.values + n * sizeof(Float32))

"Call `f` for the outputs of a block, a chunk or one at a time: with where their weights begin, their numbers, and the outputs."
@inline function over_block(f, at, kernel, b, arguments...)
    rows, counts = pointer(kernel.rows), pointer(kernel.counts)
    r, single, stop = kernel.blocks[b], kernel.singles[b], kernel.blocks[b + 1]
    while r < single
        at = f(at, integers(counts, r, Val(CHUNK_HEIGHT)), integers(rows, r, Val(CHUNK_HEIGHT)), arguments...)
        r += CHUNK_HEIGHT
    end
    while r < stop
        at = f(at, integers(counts, r, Val(1)), integers(rows, r, Val(1)), arguments...)
        r += 1
    end
    return at
end

@inline integers(p, i, n) = ntuple(c -> unsafe_load(p, i + c - 1) % Int, n)

"""
Call `f`, for each output of a chunk, with its part of `values`, where the weights that it has more than the first begin, and their
number. Returns what `f` does, and where the next weights are.
"""
@inline function over_others(f, values, at, counts)
    others = map(n -> n - first(counts), counts)
    starts = map((stop, n) -> after(at, stop - n), cumsum(others), others)
    return map(f, values, starts, others), after(at, sum(others))
end

@inline function multiply_rows!(at, counts, rows, y, between_outputs, x, between_inputs, bias, relu, width, layout)
    sums = bias == C_NULL ? map(i -> (@inline; load(y + i * between_outputs, width)), rows) :
           map(i -> (@inline; ntuple(Returns(Lane(unsafe_load(bias, i + 1))), width)), rows)
    for _ in 1:first(counts)
        weights, inputs = next(at, Val(length(rows)), x, between_inputs)
        sums = map((row, w, input) -> (@inline; add_product(row, w, input, layout)), sums, weights, inputs)
        at = after(at, length(rows))
    end
    if last(counts) > first(counts)
        sums, at = over_others((row, start, n) -> (@inline; add_products(row, start, n, x, between_inputs, layout)), sums, at, counts)
    end
    relu && (sums = map(row -> (@inline; map(s -> max(s, zero(s)), row)), sums))
    map((i, row) -> (@inline; store!(y + i * between_outputs, row, width)), rows, sums)
    return at
end

@inline function add_products(sums, at, n, x, between, layout)
    for _ in 1:n
        (weight,), (input,) = next(at, Val(1), x, between)
        sums, at = add_product(sums, weight, input, layout), after(at, 1)
    end
    return sums
end

bytes(::Val{V}) where {V} = V * sizeof(Lane)

"The next weights, and where their inputs are."
@inline next(at::NextWeights{C}, n, x, between) where {C} =
    load_weights(C, at.values, n), map(column -> x + column * between, load_columns(at.columns, n))

@inline load_weights(_, p, ::Val{1}) = (Lane(unsafe_load(p)),)
@inline load_columns(p, ::Val{1}) = (unsafe_load(p) % Int,)
# In few loads: loads, of which a product needs as many as it has vectors, are what limits the kernel.
@inline load_weights(::Type{UInt8}, p, ::Val{4}) = (load_pair(p)..., load_pair(p + 2sizeof(Float32))...)
@inline load_pair(p) = (pair = vload(Vec{2,Float32}, p); (splat(pair, Val(0)), splat(pair, Val(1))))
@inline load_columns(p::Ptr{UInt8}, ::Val{4}) =
    (all = ltoh(unsafe_load(Ptr{UInt32}(p))) % Int; (all & 0xff, all >> 8 & 0xff, all >> 16 & 0xff, all >> 24))

@inline load_columns(p::Ptr{Int32}, ::Val{4}) = (load_columns(p)..., load_columns(p + 2sizeof(Int32))...)
@inline load_columns(p::Ptr{Int32}) = (both = ltoh(unsafe_load(Ptr{UInt64}(p))); (both % Int & 0xffffffff, (both >> 32) % Int))

# The sums of places next to each other leave no register for pairs.
@inline load_weights(::Type{Int32}, p, ::Val{4}) = ntuple(c -> Lane(unsafe_load(p, c)), Val(4))

@inline splat(vector, ::Val{i}) where {i} = shufflevector(vector, Val(ntuple(Returns(i), Val(LANES))))
@inline add_product(sums::NTuple{N}, w, x, layout) where {N} =
    ntuple(v -> (@inline; muladd(w, vload(Lane, x + place(layout, v)), sums[v])), Val(N))
@inline load(p, ::Val{V}, stride = sizeof(Lane)) where {V} = ntuple(v -> vload(Lane, p + (v - 1) * stride), Val(V))
@inline load(p, ::Val{N}, layout::Apart) where {N} = ntuple(v -> (@inline; vload(Lane, p + place(layout, v))), Val(N))
@inline store!(p, vectors, ::Val{V}, stride = sizeof(Lane)) where {V} =
    ntuple(v -> (vstore(vectors[v], p + (v - 1) * stride); nothing), Val(V))

"Add to `slopes`, in the order of the kernel's weights, the products `dy * x'` where weights are kept; panels as in `multiply!`."
function add_slopes!(slopes, dy::Matrix{Float32}, x::Matrix{Float32}, kernel::SparseKernel, width::Val)
    GC.@preserve slopes dy x kernel begin
        at = NextWeights(pointer(kernel.columns), pointer(slopes))
        for b in 1:(length(kernel.blocks) - 1)
            input = block(x, (b - 1) * kernel.block, kernel.block, width)
            at = over_block(add_slopes_of_rows!, at, kernel, b, pointer(dy), input, width)
        end
    end
    return slopes
end

@inline function add_slopes_of_rows!(at, counts, rows, dy, x, width)
    deltas = map(i -> (@inline; load(dy + i * bytes(width), width)), rows)
    length(rows) == 1 && return add_slopes_of_row!(at, only(counts), only(deltas), x, width)
    for _ in 1:first(counts)
        at = add_next_slopes!(at, deltas, x, width)
    end
    if last(counts) > first(counts)
        _, at = over_others((delta, start, n) -> (@inline; add_slopes_of_row!(start, n, delta, x, width)), deltas, at, counts)
    end
    return at
end

# Four at a time, as sums over vectors take long.
@inline function add_slopes_of_row!(at, count, delta, x, width)
    for _ in 1:(count >> 2)
        at = add_next_slopes!(at, (delta, delta, delta, delta), x, width)
    end
    for _ in 1:(count & 3)
        at = add_next_slopes!(at, (delta,), x, width)
    end
    return at
end

@inline function add_next_slopes!(at, deltas, x, width)
    _, inputs = next(at, Val(length(deltas)), x, bytes(width))
    add_sums!(at.values, map(product, deltas, inputs))
    return after(at, length(deltas))
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
