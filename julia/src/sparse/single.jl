# One sample is a vector, in which a kept weight of a layer has to find its input. Under windows, what it is multiplied with is
# next to each other here too: the places of a row.

"The kept weights of a layer, output by output, each with its input."
struct SparseRows
    relu::Bool
    bias::Vector{Float32}
    pointers::Vector{Int32} # where the weights of each output begin, and the end
    indices::Vector{Int32} # inputs, from 1
    weights::Vector{Float32}
end

function SparseRows(W, mask, bias, relu)
    by_output = [findall(row) for row in eachrow(mask)]
    pointers = cumsum([1; map(length, by_output)])
    indices = reduce(vcat, by_output)
    weights = reduce(vcat, (W[i, kept] for (i, kept) in enumerate(by_output)))
    return SparseRows(relu, bias, pointers, indices, weights)
end

"Inputs among which a vector of weights finds its own, in the registers of AVX-512."
const SPAN = 4LANES

"""
The kept weights of a layer, output by output, LANES at a time: those within SPAN inputs, which are loaded into four registers and
permuted. It takes less time than a load for each input unless few weights are left, and less than all weights take. What is read
of the sample reaches SPAN beyond its end.
"""
struct PermutedRows
    relu::Bool
    bias::Vector{Float32}
    pointers::Vector{Int32} # where the vectors of each output begin, and the end
    starts::Vector{Int32} # the first of the SPAN inputs, from 0
    places::Vector{UInt8} # the inputs of a vector among these
    weights::Vector{Float32} # 0 where a vector has fewer than LANES
end

function PermutedRows(W, mask, bias, relu)
    pointers, starts, places, weights = Int32[1], Int32[], UInt8[], Float32[]
    for (i, row) in enumerate(eachrow(mask))
        kept, k = findall(row), 1
        while k <= length(kept)
            start = (kept[k] - 1) ÷ LANES * LANES
            stop = min(k + LANES - 1, searchsortedlast(kept, start + SPAN))
            push!(starts, start)
            append!(places, kept[k:stop] .- (start + 1), zeros(UInt8, LANES - 1 + k - stop))
            append!(weights, W[i, kept[k:stop]], zeros(Float32, LANES - 1 + k - stop))
            k = stop + 1
        end
        push!(pointers, length(starts) + 1)
    end
    return PermutedRows(relu, bias, pointers, starts, places, weights)
end

outputs(rows::Union{SparseRows,PermutedRows}) = length(rows.bias)

"`y = W * x .+ bias` and the fused activation for one sample."
function multiply!(y::Vector{Float32}, x::Vector{Float32}, rows::SparseRows)
    (; pointers, indices, weights, bias, relu) = rows
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

function multiply!(y::Vector{Float32}, x::Vector{Float32}, rows::PermutedRows)
    (; pointers, bias, relu) = rows
    GC.@preserve x rows @inbounds for i in eachindex(bias)
        k, stop = pointers[i] % Int, pointers[i + 1] % Int
        a = b = zero(Lane)
        while k + 1 < stop
            a, b = add_permuted(a, pointer(x), rows, k), add_permuted(b, pointer(x), rows, k + 1)
            k += 2
        end
        k < stop && (a = add_permuted(a, pointer(x), rows, k))
        total = sum(a + b) + bias[i]
        y[i] = relu ? max(total, 0.0f0) : total
    end
    return y
end

@inline function add_permuted(sums, x, rows, k)
    a, b, c, d = load(x + 4 * unsafe_load(pointer(rows.starts), k), Val(4))
    places = convert(Vec{LANES,Int32}, vload(Vec{LANES,UInt8}, pointer(rows.places) + (k - 1) * LANES))
    inputs = vifelse((places & Int32(2LANES)) == zero(Int32), permuted(a, b, places), permuted(c, d, places))
    return muladd(vload(Lane, pointer(rows.weights) + (k - 1) * sizeof(Lane)), inputs, sums)
end

"Of the values of two vectors, one after the other, those at `places`, of which the lowest five bits count."
@inline permuted(a::Lane, b::Lane, places) = Vec(ccall("llvm.x86.avx512.vpermi2var.ps.512", llvmcall, Registers{Float32},
    (Registers{Float32}, Registers{Int32}, Registers{Float32}), a.data, places.data, b.data))

"""
The kept weights of a convolution, for one sample: what each tap of a block finds at places next to each other is copied to where
that block stays in the fastest cache, so that no load is of two of its lines.
"""
struct SparsePlaces
    windows::Windows
    kernel::SparseKernel{LOW,UInt8}
    taps::Vector{Int}
end

function SparsePlaces(windows, W, mask, bias, relu)
    block = even_blocks(size(W, 2), BLOCK_VECTORS ÷ vectors(SparsePlaces))
    return SparsePlaces(windows, SparseKernel{LOW}(W, mask, bias, relu, block), taps(windows))
end

bias(kernel::SparsePlaces) = kernel.kernel.bias
vectors(::Type{SparsePlaces}) = vectors(SparseWindows)

"What taps find at places next to each other, for `x` at the first, and where that of a block goes."
struct Found
    x::Ptr{Float32}
    taps::Vector{Int}
    block::Ptr{Float32}
end

function block((; x, taps, block)::Found, start, size, width::Val)
    for k in 1:min(size, length(taps) - start)
        store!(block + (k - 1) * bytes(width), load(x + (@inbounds taps[start + k]) * sizeof(Float32), width), width)
    end
    return block
end

function multiply!(y::Vector{Float32}, x::Vector{Float32}, kernel::SparsePlaces)
    plane, behind = corners(kernel.windows), lines(outputs(kernel))
    GC.@preserve x y kernel begin
        to, memory = pointer(y, behind + 1), pointer(y, behind + plane * length(bias(kernel)) + 1)
        over_places(plane ÷ LANES, Val(vectors(SparsePlaces)), Val(1)) do i, sums
            found = Found(pointer(x, i * LANES + 1), kernel.taps, memory)
            multiply_blocks!(to + i * sizeof(Lane), plane * sizeof(Float32), found, sums, kernel.kernel, sums, SideBySide())
        end
    end
    return take_corners!(y, kernel)
end

function multiply!(y::Vector{Float32}, x::Vector{Float32}, kernel::DenseKernel)
    if length(kernel.windows.rows) * row_length(kernel.windows) > 1
        plane = corners(kernel.windows)
        GC.@preserve x y kernel multiply_row!(pointer(y, lines(outputs(kernel)) + 1), plane * sizeof(Float32), pointer(x),
                                              sizeof(Float32), plane ÷ LANES, kernel, Val(1), SideBySide())
        return take_corners!(y, kernel)
    end
    out = view(y, 1:outputs(kernel))
    mul!(out, kernel.W, view(x, 1:inputs(kernel)))
    out .= kernel.relu ? max.(out .+ kernel.bias, 0) : out .+ kernel.bias
    return y
end

"""
Of one sample, outputs are computed at all places between the first and the last corner, as if the input were one row, LANES at
a time, and written behind those at corners, which then are taken from them. What is computed for nothing, at the ends of rows,
is little unless windows are far apart.
"""
function take_corners!(y, kernel)
    n, step = row_length(kernel.windows), row_step(kernel.windows)
    behind, plane, to = lines(outputs(kernel)), corners(kernel.windows), pointer(y)
    GC.@preserve y for output in eachindex(bias(kernel)), corner in kernel.windows.rows
        from = pointer(y, behind + (output - 1) * plane + corner + 1)
        store_row!(i -> (@inline; every(step, from + i * step * sizeof(Float32), n - i)), to, n)
        to += n * sizeof(Float32)
    end
    return y
end

"So many values, rounded up to whole vectors."
lines(n) = cld(n, LANES) * LANES

"Places from the first corner of windows to the last, rounded up to whole vectors."
corners(windows) = lines(last(windows.rows) + (row_length(windows) - 1) * row_step(windows) + 1)

"How long vectors of inputs and of outputs must be."
buffer_length(kernel) = max(inputs(kernel), lines(outputs(kernel)) + behind_outputs(kernel)) + SPAN
behind_outputs(kernel) = 0
behind_outputs(kernel::Union{DenseKernel,SparseWindows,SparsePlaces}) =
    corners(kernel.windows) * length(bias(kernel)) + BLOCK_VECTORS * LANES

function multiply!(y::Vector{Float32}, x::Vector{Float32}, (; windows, mean)::Pooling)
    (; rows, taps, plane) = windows
    n, step, columns, to = row_length(windows), row_step(windows), first(windows.size)::Int, pointer(y)
    GC.@preserve x y for channel in 0:(channels(windows) - 1), corner in rows
        from = pointer(x, channel * plane + corner + 1)
        store_row!(to, n) do i
            @inline
            values = from + i * step * sizeof(Float32)
            step == 2 && return mean ? every_second(values, +, taps, columns) / Float32(length(taps)) :
                                every_second(values, max, taps, columns)
            return over_taps(tap -> (@inline; (every(step, values + tap * sizeof(Float32), n - i),)), taps, mean)[1]
        end
        to += n * sizeof(Float32)
    end
    return y
end

"Of windows two places apart: what is above each other is reduced first, so that each value is loaded once."
@inline function every_second(p, op, taps, columns)
    values = of_two_columns(p, op, taps, columns, columns == 1)
    for c in 2:2:(columns - 1)
        values = op(values, of_two_columns(p + c * sizeof(Float32), op, taps, columns, c == columns - 1))
    end
    return values
end

@inline function of_two_columns(p, op, taps, columns, is_one)
    both = reduced(tap -> (@inline; load(p + tap * sizeof(Float32), Val(2))), op, taps, columns)
    even = shufflevector(both..., Val(ntuple(i -> 2i - 2, Val(LANES))))
    return is_one ? even : op(even, shufflevector(both..., Val(ntuple(i -> 2i - 1, Val(LANES)))))
end

"Every `step`-th of the values at `p`, of which there are `n`."
@inline function every(step, p, n)
    step == 1 && return vload(Lane, p)
    step == 2 && return shufflevector(vload(Lane, p), vload(Lane, p + sizeof(Lane)), Val(ntuple(i -> 2i - 2, Val(LANES))))
    return Lane(ntuple(i -> unsafe_load(p, 1 + step * min(i - 1, n - 1)), Val(LANES)))
end

multiply!(y::Vector{Float32}, x::Vector{Float32}, kernel::Union{Padding,Scaling}) = apply!(y, x, kernel, 1)
