# Activations are held in panels: for each feature, the values of some samples next to each other, so that a kept weight
# is one broadcast and as many vector operations as the samples take. A panel of V vectors is V * LANES samples wide;
# LLVM splits the vectors where the processor has shorter ones.
const LANES = 16
const Lane = Vec{LANES,Float32}
const MAX_VECTORS = 4

"Inputs whose values of a panel stay in the fastest cache while the weights of all outputs pass over them."
const BLOCK = 128

"""
    SparseKernel(W, mask, bias, relu)

The kept weights of a layer, block of inputs by block, so that the work is proportional to their number. Within a
block, outputs come in the order of their number of weights: loops of one length after another are predicted well. `relu` is fused.
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
    pointers::Vector{Int32} # the same by output, for single samples: where each begins, and the end
    indices::Vector{Int32} # inputs, from 1
    weights::Vector{Float32}
end

function SparseKernel(W, mask, bias, relu)
    outputs, inputs = size(W)
    blocks, rows, counts, columns, values = Int[1], Int32[], Int32[], UInt8[], Float32[]
    for start in 1:BLOCK:inputs
        block = start:min(start + BLOCK - 1, inputs)
        numbers = vec(count(view(mask, :, block); dims = 2))
        for i in sortperm(numbers)
            # In the first block outputs get their bias, in the last their activation.
            numbers[i] == 0 && first(block) > 1 && last(block) < inputs && continue
            kept = findall(view(mask, i, block))
            push!(rows, i - 1)
            push!(counts, length(kept))
            append!(columns, kept .- 1)
            append!(values, view(W, i, block[kept]))
        end
        push!(blocks, length(rows) + 1)
    end
    by_output = [findall(row) for row in eachrow(mask)]
    pointers = cumsum([1; map(length, by_output)])
    indices = reduce(vcat, by_output)
    weights = reduce(vcat, (W[i, kept] for (i, kept) in enumerate(by_output)))
    return SparseKernel(inputs, outputs, relu, bias, blocks, rows, counts, columns, values, pointers, indices, weights)
end

"All weights of a layer, multiplied by BLAS."
struct DenseKernel
    inputs::Int
    outputs::Int
    relu::Bool
    bias::Vector{Float32}
    W::Matrix{Float32}
end

DenseKernel(W, bias, relu) = DenseKernel(size(W, 2), size(W, 1), relu, bias, W)

"`y = W * x .+ bias` and the fused activation for panels of V vectors: `x` is (samples, inputs), `y` (samples, outputs)."
function multiply!(y::Matrix{Float32}, x::Matrix{Float32}, kernel::SparseKernel, ::Val{V}) where {V}
    GC.@preserve x y kernel begin
        columns, values = pointer(kernel.columns), pointer(kernel.values)
        n = length(kernel.blocks) - 1
        for b in 1:n
            input = pointer(x) + (b - 1) * BLOCK * V * sizeof(Lane)
            columns, values = multiply_block!(pointer(y), input, kernel, b, n, columns, values, Val(V))
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

@inline function add_products(sums, x, columns, values, count, ::Val{V}) where {V}
    for k in 1:count
        w = Lane(unsafe_load(values, k))
        input = x + (unsafe_load(columns, k) % Int) * V * sizeof(Lane)
        sums = add_product(sums, w, input, Val(V))
    end
    return sums
end

@inline add_product(sums, w, x, ::Val{V}) where {V} =
    ntuple(v -> muladd(w, vload(Lane, x + (v - 1) * sizeof(Lane)), sums[v]), Val(V))
@inline load(p, ::Val{V}, stride = sizeof(Lane)) where {V} = ntuple(v -> vload(Lane, p + (v - 1) * stride), Val(V))
@inline store!(p, vectors, ::Val{V}, stride = sizeof(Lane)) where {V} =
    ntuple(v -> (vstore(vectors[v], p + (v - 1) * stride); nothing), Val(V))

function multiply!(y::Matrix{Float32}, x::Matrix{Float32}, kernel::DenseKernel, ::Val{V}) where {V}
    samples = V * LANES
    GC.@preserve x y mul!(unsafe_wrap(Array, pointer(y), (samples, kernel.outputs)),
                          unsafe_wrap(Array, pointer(x), (samples, kernel.inputs)), kernel.W')
    at = pointer(y)
    GC.@preserve y for b in kernel.bias
        sums = map(s -> s + b, load(at, Val(V)))
        store!(at, kernel.relu ? map(s -> max(s, zero(s)), sums) : sums, Val(V))
        at += V * sizeof(Lane)
    end
    return y
end

"The same for one sample."
function multiply!(y::Vector{Float32}, x::Vector{Float32}, kernel::SparseKernel)
    (; pointers, indices, weights, bias, relu) = kernel
    @inbounds for i in eachindex(bias)
        k, stop = pointers[i] % Int, pointers[i + 1] % Int
        a = b = c = d = 0.0f0
        while k + 3 < stop
            a = muladd(weights[k], x[indices[k]], a)
            b = muladd(weights[k + 1], x[indices[k + 1]], b)
            c = muladd(weights[k + 2], x[indices[k + 2]], c)
            d = muladd(weights[k + 3], x[indices[k + 3]], d)
            k += 4
        end
        while k < stop
            a = muladd(weights[k], x[indices[k]], a)
            k += 1
        end
        sum = ((a + b) + (c + d)) + bias[i]
        y[i] = relu ? max(sum, 0.0f0) : sum
    end
    return y
end

function multiply!(y::Vector{Float32}, x::Vector{Float32}, kernel::DenseKernel)
    out = view(y, 1:(kernel.outputs))
    mul!(out, kernel.W, view(x, 1:(kernel.inputs)))
    out .= kernel.relu ? max.(out .+ kernel.bias, 0) : out .+ kernel.bias
    return y
end

"""
    transpose_into!(to, to_stride, from, from_stride, rows, columns)

Write the transpose of the column-major (rows, columns) matrix at the pointer `from` to `to`; strides are the distances
between columns. Tiles of LANES × LANES are transposed in registers.
"""
function transpose_into!(to, to_stride, from, from_stride, rows, columns)
    tiled_rows, tiled_columns = rows - rows % LANES, columns - columns % LANES
    for j in 0:LANES:(tiled_columns - 1), i in 0:LANES:(tiled_rows - 1)
        tile = load(from + 4 * (i + j * from_stride), Val(LANES), 4 * from_stride)
        store!(to + 4 * (j + i * to_stride), transposed(tile), Val(LANES), 4 * to_stride)
    end
    for j in 0:(columns - 1), i in (j < tiled_columns ? tiled_rows : 0):(rows - 1)
        unsafe_store!(to + 4 * (j + i * to_stride), unsafe_load(from + 4 * (i + j * from_stride)))
    end
    return nothing
end

@inline transposed(tile) = exchanged(exchanged(exchanged(exchanged(tile, Val(8)), Val(4)), Val(2)), Val(1))

"Exchange the off-diagonal quarters of all squares of twice `width` × `width`."
@generated function exchanged(tile::NTuple{LANES,Lane}, ::Val{width}) where {width}
    lanes = 0:(LANES - 1)
    low = Tuple(l & width == 0 ? l : l - width + LANES for l in lanes)
    high = Tuple(l & width == 0 ? l + width : l + LANES for l in lanes)
    rows = [k & width == 0 ? :(shufflevector(tile[$(k + 1)], tile[$(k + 1 + width)], Val($low))) :
            :(shufflevector(tile[$(k + 1 - width)], tile[$(k + 1)], Val($high))) for k in lanes]
    return :(tuple($(rows...)))
end
