# Activations are held in panels: for each feature, the values of some samples next to each other, so that a kept weight
# is one broadcast and as many vector operations as the samples take. A panel of V vectors is V * LANES samples wide;
# LLVM splits the vectors where the processor has shorter ones.
const LANES = 16
const Lane = Vec{LANES,Float32}
const MAX_VECTORS = 4

"Inputs whose values of a panel stay in the fastest cache while the weights of all outputs pass over them."
const BLOCK = 160

"Outputs that a dense layer computes at once, as many as registers hold: 24 vectors of AVX-512's 32."
const GROUP = CPUID.test_cpu_feature(CPUID.JL_X86_avx512f) ? 6 : 1

"""
    SparseKernel(W, mask, bias, relu)

The kept weights of a layer for panels, block of inputs by block, so that the work is proportional to their number. Within a
block, outputs come in the order of their number of weights: loops of one length after another are predicted well. `relu` is
fused.
"""
struct SparseKernel
    inputs::Int
    outputs::Int
    relu::Bool
    bias::Vector{Float32}
    blocks::Vector{Int} # where in `rows` each begins, and the end
    rows::Vector{Int32} # outputs, from 0
    counts::Vector{Int32} # of their weights in the block
    columns::Vector{UInt8} # inputs in the block, from 0
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
to the next.
"""
function packed(kept, strides, bias, relu)
    inputs, outputs = size(kept)
    n = count(kept)
    blocks, rows, counts = Int[1], Int32[], Int32[]
    columns, places = Vector{UInt8}(undef, n + 1), Vector{Int32}(undef, n + 1)
    k = 1
    for start in 1:BLOCK:inputs
        block = start:min(start + BLOCK - 1, inputs)
        numbers = [count(view(kept, block, i)) for i in 1:outputs]
        for i in sortperm(numbers)
            # In the first block outputs get their bias, in the last their activation.
            numbers[i] == 0 && first(block) > 1 && last(block) < inputs && continue
            push!(rows, i - 1)
            push!(counts, numbers[i])
            @inbounds for j in block # written first and kept or not after, as which are kept cannot be predicted
                columns[k] = (j - start) % UInt8
                places[k] = ((j - 1) * strides[1] + (i - 1) * strides[2] + 1) % Int32
                k += kept[j, i]
            end
        end
        push!(blocks, length(rows) + 1)
    end
    kernel = SparseKernel(inputs, outputs, relu, bias, blocks, rows, counts, resize!(columns, n), zeros(Float32, n))
    return kernel, resize!(places, n)
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

block(x::Matrix, b, ::Val{V}) where {V} = pointer(x) + (b - 1) * BLOCK * V * sizeof(Lane)

function block(x::Rows, b, ::Val{V}) where {V}
    start = (b - 1) * BLOCK
    x.finite &= transpose_into!(x.block, V * LANES, x.from + start * sizeof(Float32), x.features,
                                min(BLOCK, x.features - start), x.samples)
    return x.block
end

inputs(kernel::SparseKernel) = kernel.inputs
outputs(kernel::SparseKernel) = kernel.outputs

"`y = W * x .+ bias` and the fused activation for panels of V vectors: `x` is (samples, inputs), `y` (samples, outputs)."
function multiply!(y::Matrix{Float32}, x::Union{Matrix{Float32},Rows}, kernel::SparseKernel, ::Val{V}) where {V}
    GC.@preserve x y kernel begin
        columns, values = pointer(kernel.columns), pointer(kernel.values)
        n = length(kernel.blocks) - 1
        for b in 1:n
            columns, values = multiply_block!(pointer(y), block(x, b, Val(V)), kernel, b, n, columns, values, Val(V))
        end
    end
    return y
end

function multiply_block!(y, x, kernel, b, n, columns, values, ::Val{V}) where {V}
    rows, counts, bias = pointer(kernel.rows), pointer(kernel.counts), pointer(kernel.bias)
    for r in kernel.blocks[b]:(kernel.blocks[b + 1] - 1)
        i, count = unsafe_load(rows, r) % Int, unsafe_load(counts, r) % Int
        output = y + i * V * sizeof(Lane)
        sums = b == 1 ? ntuple(_ -> Lane(unsafe_load(bias, i + 1)), Val(V)) : load(output, Val(V))
        sums = add_products(sums, x, columns, values, count, Val(V))
        kernel.relu && b == n && (sums = map(s -> max(s, zero(s)), sums))
        store!(output, sums, Val(V))
        columns += count
        values += count * sizeof(Float32)
    end
    return columns, values
end

# In pairs, so that two weights and two columns take one load each: loads, of which a product needs as many as it has
# vectors, are what limits the kernel.
@inline function add_products(sums, x, columns, values, count, ::Val{V}) where {V}
    k = 0
    while k < count - 1
        pair = vload(Vec{2,Float32}, values + k * sizeof(Float32))
        both = unsafe_load(Ptr{UInt16}(columns + k)) % UInt32
        first, second = ENDIAN_BOM == 0x04030201 ? (both & 0xff, both >> 8) : (both >> 8, both & 0xff)
        sums = add_product(sums, splat(pair, Val(0)), x + first * V * sizeof(Lane))
        sums = add_product(sums, splat(pair, Val(1)), x + second * V * sizeof(Lane))
        k += 2
    end
    if k < count
        input = x + unsafe_load(columns, k + 1) * V * sizeof(Lane)
        sums = add_product(sums, Lane(unsafe_load(values, k + 1)), input)
    end
    return sums
end

@inline splat(vector, ::Val{i}) where {i} = shufflevector(vector, Val(ntuple(Returns(i), Val(LANES))))
@inline add_product(sums::NTuple{N}, w, x) where {N} =
    ntuple(v -> muladd(w, vload(Lane, x + (v - 1) * sizeof(Lane)), sums[v]), Val(N))
@inline load(p, ::Val{V}, stride = sizeof(Lane)) where {V} = ntuple(v -> vload(Lane, p + (v - 1) * stride), Val(V))
@inline store!(p, vectors, ::Val{V}, stride = sizeof(Lane)) where {V} =
    ntuple(v -> (vstore(vectors[v], p + (v - 1) * stride); nothing), Val(V))

"Add to `slopes`, in the order of the kernel's weights, the products `dy * x'` where weights are kept; panels as in `multiply!`."
function add_slopes!(slopes, dy::Matrix{Float32}, x::Matrix{Float32}, kernel::SparseKernel, ::Val{V}) where {V}
    GC.@preserve slopes dy x kernel begin
        at, columns = pointer(slopes), pointer(kernel.columns)
        for b in 1:(length(kernel.blocks) - 1)
            at, columns = add_slopes_of_block!(at, pointer(dy), block(x, b, Val(V)), kernel, b, columns, Val(V))
        end
    end
    return slopes
end

function add_slopes_of_block!(at, dy, x, kernel, b, columns, ::Val{V}) where {V}
    for r in kernel.blocks[b]:(kernel.blocks[b + 1] - 1)
        count = kernel.counts[r] % Int
        row = load(dy + kernel.rows[r] * V * sizeof(Lane), Val(V))
        k = 0
        while k < count - 3
            quad = sums(product(row, x, columns, k, Val(V)), product(row, x, columns, k + 1, Val(V)),
                        product(row, x, columns, k + 2, Val(V)), product(row, x, columns, k + 3, Val(V)))
            vstore(vload(Vec{4,Float32}, at + 4k) + quad, at + 4k)
            k += 4
        end
        while k < count
            unsafe_store!(at + 4k, unsafe_load(at + 4k) + sum(product(row, x, columns, k, Val(V))))
            k += 1
        end
        at += 4count
        columns += count
    end
    return at, columns
end

@inline function product(row, x, columns, k, ::Val{V}) where {V}
    input = x + unsafe_load(columns, k + 1) * V * sizeof(Lane)
    sums = row[1] * vload(Lane, input)
    for v in 2:V
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
    for j in 0:(columns - 1), i in (j < tiled_columns ? tiled_rows : 0):(rows - 1)
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
@inline function tile_of_rows(p, stride)
    ab = interleaved(quarters(p, 4stride), quarters(p + stride, 4stride))
    cd = interleaved(quarters(p + 2stride, 4stride), quarters(p + 3stride, 4stride))
    return (quarterwise(ab[1], cd[1], Val((0, 1, 16, 17))), quarterwise(ab[1], cd[1], Val((2, 3, 18, 19))),
            quarterwise(ab[2], cd[2], Val((0, 1, 16, 17))), quarterwise(ab[2], cd[2], Val((2, 3, 18, 19))))
end

@inline quarters(p, stride) = joined(joined(quarter(p), quarter(p + stride)), joined(quarter(p + 2stride), quarter(p + 3stride)))
@inline quarter(p) = vload(Vec{4,Float32}, p)
@inline joined(a::Vec{N}, b::Vec{N}) where {N} = shufflevector(a, b, Val(ntuple(i -> i - 1, Val(2N))))
@inline interleaved(a, b) = quarterwise(a, b, Val((0, 16, 1, 17))), quarterwise(a, b, Val((2, 18, 3, 19)))
@inline quarterwise(a, b, ::Val{lanes}) where {lanes} =
    shufflevector(a, b, Val(ntuple(i -> lanes[(i - 1) % 4 + 1] + 4 * ((i - 1) ÷ 4), Val(LANES))))
