# Features of a panel are in the order of Flux's arrays, the first dimension fastest. So what lies under a window is at the
# same distances from its corner wherever that is, and the outputs of windows next to each other are next to each other: they
# are computed together, as many as registers hold.

"""
    Windows(input, size, stride, dilation, plane)

The places of windows of `size` in an input of size `(places..., channels)`, which is padded already and whose channels are
`plane` features apart.
"""
struct Windows
    input::Dims
    plane::Int
    size::Dims
    stride::Dims
    output::Dims # without channels
    rows::Vector{Int} # the corner of the first window of each row, as its distance from the first feature
    taps::Vector{Int} # distances from the corner, of one channel
end

function Windows(input, size, stride, dilation, plane)
    places = Base.front(input)
    output = @. (places - dilation * (size - 1) - 1) ÷ stride + 1
    all(>(0), output) || throw(DimensionMismatch("windows of size $size do not fit into $places places"))
    distances = cumprod((1, Base.front(places)...))
    at(place, steps) = sum((Tuple(place) .- 1) .* steps .* distances)
    rows = vec([at(place, stride) for place in CartesianIndices((1, Base.tail(output)...))])
    return Windows(input, plane, size, stride, output, rows, vec([at(place, dilation) for place in CartesianIndices(size)]))
end

"Of a layer whose outputs depend on all inputs: one window, and each input a channel."
Windows(inputs::Int) = Windows((1, inputs), (1,), (1,), (1,), 1)

channels(windows)::Int = last(windows.input)
row_step(windows)::Int = first(windows.stride) # from one corner to the next one of the row
row_length(windows)::Int = first(windows.output)
"The distances of everything under a window from its corner, channel by channel."
taps(windows) = vec([tap + channel * windows.plane for tap in windows.taps, channel in 0:(channels(windows) - 1)])

"""
The weights of a layer, a matrix (outputs, taps), as they are multiplied with what is under its windows: all of them,
`packed` with GROUP outputs side by side.
"""
struct DenseKernel
    windows::Windows
    relu::Bool
    bias::Vector{Float32}
    taps::Vector{Int}
    packed::Array{Float32,3} # (GROUP, taps, groups)
    W::Matrix{Float32}
end

function DenseKernel(windows, W, bias, relu)
    padded = zeros(Float32, cld(size(W, 1), GROUP) * GROUP, size(W, 2))
    padded[axes(W)...] = W
    packed = permutedims(reshape(padded, GROUP, :, size(W, 2)), (1, 3, 2))
    return DenseKernel(windows, relu, bias, taps(windows), packed, W)
end

"""
The kept weights of a convolution: a kernel whose inputs are what lies under a window, and its columns the distances of these from
the corner.
"""
struct SparseWindows
    windows::Windows
    kernel::SparseKernel{LOW,Int32}
end

function SparseWindows(windows, W, mask, bias, relu)
    block = even_blocks(size(W, 2), taps_of_block(windows))
    (; inputs, outputs, blocks, rows, counts), places =
        packed(SparseKernel{LOW}, even_chunks!(permutedims(mask), block, Val(LOW)), (size(W, 1), 1), bias, relu, block)
    columns, values = Int32.(taps(windows))[cld.(places, outputs)], view(W, places) .* view(mask, places)
    kernel = SparseKernel{LOW,Int32}(inputs, outputs, relu, bias, block, blocks, rows, counts, columns, values)
    return SparseWindows(windows, kernel)
end

"How many taps have their inputs in the fastest cache while the weights of all outputs pass over those of neighbouring windows."
function taps_of_block(windows)
    columns = first(windows.size)
    return clamp(BLOCK_VECTORS * columns ÷ ((vectors(SparseWindows) - 1) * row_step(windows) + columns), 1, 255)
end

"The largest or the mean value under each window, channel by channel."
struct Pooling
    windows::Windows
    mean::Bool
end

"Values around rows of an input of size `(places..., channels)`, whose channels then are `plane` features apart."
struct Padding
    input::Dims
    outputs::Int
    rows::Vector{Int} # where each goes, as its distance from the first feature
    value::Float32
end

function Padding(input::Dims, output::Dims, plane, before::Dims, value)
    places, channels = LinearIndices(Base.front(output)), last(output)
    first_places = CartesianIndices((1, Base.tail(Base.front(input))...)) .+ CartesianIndex(before)
    rows = vec([places[place] - 1 + (channel - 1) * plane for place in first_places, channel in 1:channels])
    return Padding(input, plane * channels, rows, value)
end

"What batch normalisation does: values times `scale` plus `shift`, each for as many features as a channel has."
struct Scaling
    features::Int
    scale::Vector{Float32}
    shift::Vector{Float32}
end

inputs(kernel)::Int = kernel.windows.plane * channels(kernel.windows)
outputs(kernel)::Int = prod(kernel.windows.output) * length(bias(kernel))
bias(kernel::DenseKernel) = kernel.bias
bias(kernel::SparseWindows) = kernel.kernel.bias
outputs(pool::Pooling)::Int = prod(pool.windows.output) * channels(pool.windows)
inputs(padding::Padding)::Int = prod(padding.input)
outputs(padding::Padding) = padding.outputs
inputs(scaling::Scaling) = scaling.features
outputs(scaling::Scaling) = scaling.features

"How many vectors of sums of an output a kernel computes at once, at most."
vectors(::Type{DenseKernel}) = MAX_VECTORS
vectors(::Type{SparseWindows}) = AVX512 ? 7 : MAX_VECTORS

function multiply!(y::Matrix{Float32}, x::Matrix{Float32}, kernel::Union{DenseKernel,SparseWindows}, width::Val{V}) where {V}
    return multiply_windows!(y, x, kernel, width, Apart(V, row_step(kernel.windows)))
end

function multiply_windows!(y, x, kernel, width, layout)
    (; rows) = kernel.windows
    n, feature = row_length(kernel.windows), bytes(width)
    GC.@preserve x y kernel for (r, corner) in enumerate(rows)
        multiply_row!(pointer(y) + (r - 1) * n * feature, n * length(rows) * feature, pointer(x) + corner * feature, feature, n,
                      kernel, width, layout)
    end
    return y
end

"""
The outputs at `n` places of a row, of as many vectors each as a panel is wide, for `y` and `x` at the first; from an output to the
next it is `plane` bytes, from a feature to the next `feature`.
"""
function multiply_row!(y, plane, x, feature, n, kernel::SparseWindows, width, layout::Apart{<:Any,step}) where {step}
    over_places(n, Val(vectors(SparseWindows)), width) do i, sums
        multiply_blocks!(y + i * bytes(width), plane, x + i * step * bytes(width), feature, kernel.kernel, sums, layout)
    end
    return nothing
end

function multiply_row!(y, plane, x, feature, n, kernel::DenseKernel, width, layout::Apart{<:Any,step}) where {step}
    for g in axes(kernel.packed, 3)
        to = y + (g - 1) * GROUP * plane
        over_places(n, Val(vectors(DenseKernel)), width) do i, sums
            multiply_places!(to + i * bytes(width), plane, x + i * step * bytes(width), feature, kernel, g, sums, layout)
        end
    end
    return nothing
end

"""
Call `f` for some of `n` places after the other, which together have at most `most` vectors of V each: with the first of them, from
0, and the number of their vectors.
"""
@inline function over_places(f, n, most::Val{M}, width::Val{V}) where {M,V}
    i = 0
    while i < n
        places = cld(n - i, cld(n - i, M ÷ V)) # that none are left alone
        with_vectors(f, i, places * V, Val(M ÷ V * V), width)
        i += places
    end
end

@inline with_vectors(f, i, n, vectors::Val{N}, width::Val{V}) where {N,V} =
    N == V || n == N ? f(i, vectors) : with_vectors(f, i, n, Val(N - V), width)

function multiply_places!(y, plane, x, feature, kernel::DenseKernel, g, ::Val{N}, layout) where {N}
    n, taps = length(kernel.taps), pointer(kernel.taps)
    weights = pointer(kernel.packed) + (g - 1) * GROUP * n * sizeof(Float32)
    sums = ntuple(_ -> ntuple(_ -> zero(Lane), Val(N)), Val(GROUP))
    for k in 1:n
        sums = add_row(sums, load(x + unsafe_load(taps, k) * feature, Val(N), layout), weights + (k - 1) * GROUP * sizeof(Float32))
    end
    for i in 1:min(GROUP, length(kernel.bias) - (g - 1) * GROUP)
        b = @inbounds kernel.bias[(g - 1) * GROUP + i]
        row = map(s -> kernel.relu ? max(s + b, zero(s)) : s + b, sums[i])
        store!(y + (i - 1) * plane, row, Val(N))
    end
    return nothing
end

@inline add_row(sums, input, weights) =
    ntuple(i -> (w = Lane(unsafe_load(weights, i)); map((s, x) -> muladd(w, x, s), sums[i], input)), Val(GROUP))

function multiply!(y::Matrix{Float32}, x::Matrix{Float32}, pool::Pooling, width::Val)
    (; windows) = pool
    to, feature, n = pointer(y), bytes(width), row_length(windows)
    GC.@preserve x y for channel in 0:(channels(windows) - 1), corner in windows.rows
        pool_row!(to, pointer(x) + (channel * windows.plane + corner) * feature, pool, width)
        to += n * feature
    end
    return y
end

function pool_row!(y, x, pool::Pooling, width::Val{V}) where {V}
    n, step = row_length(pool.windows), row_step(pool.windows) * bytes(width)
    fours = V == 1 ? n ÷ 4 * 4 : 0
    for i in 0:4:(fours - 1)
        pool_places!(y + i * bytes(width), x + i * step, pool, bytes(width), Val(4), step)
    end
    for i in fours:(n - 1)
        pool_places!(y + i * bytes(width), x + i * step, pool, bytes(width), width, sizeof(Lane))
    end
    return nothing
end

"The pooled values of N vectors, at a distance of `step` bytes for the first tap."
@inline function pool_places!(y, x, (; windows, mean), feature, vectors::Val, step)
    return store!(y, over_taps(tap -> (@inline; load(x + tap * feature, vectors, step)), windows.taps, mean), vectors)
end

"The means, or the largest, of the vectors that `load` gives for taps."
@inline over_taps(load, taps, mean) =
    mean ? map(sum -> sum / Float32(length(taps)), reduced(load, +, taps)) : reduced(load, max, taps)

@inline function reduced(load, op, taps, step = 1)
    values, t = load(@inbounds taps[1]), 1 + step
    while t <= length(taps)
        values = map(op, values, load(@inbounds taps[t]))
        t += step
    end
    return values
end

"""
A convolution of images and the pooling of its outputs, of which only as many rows are there at a time as a row of pooled ones
needs. Takes memory behind the outputs, see [`room`](@ref).
"""
struct PooledWindows{K<:Union{DenseKernel,SparseWindows}}
    convolution::K
    pool::Pooling # of these rows
    rows::Int # from the first of these to the first for the next row
end

pooled_rows((; convolution, pool, rows)::PooledWindows) =
    (length(convolution.windows.rows) - pool.windows.input[2]) ÷ rows + 1
inputs(kernel::PooledWindows) = inputs(kernel.convolution)
outputs(kernel::PooledWindows) = outputs(kernel.pool) * pooled_rows(kernel)

"How many features `y` must have."
room(kernel) = outputs(kernel)
room(kernel::PooledWindows) = outputs(kernel) + inputs(kernel.pool)

multiply!(y::Matrix{Float32}, x::Matrix{Float32}, kernel::PooledWindows, width::Val{V}) where {V} =
    multiply_windows!(y, x, kernel, width, Apart(V, row_step(kernel.convolution.windows)))

function multiply_windows!(y, x, kernel::PooledWindows, width, layout)
    (; convolution, pool) = kernel
    corners, feature = convolution.windows.rows, bytes(width)
    n, pooled, m = row_length(convolution.windows), pooled_rows(kernel), row_length(pool.windows)
    GC.@preserve x y kernel for r in 0:(pooled - 1)
        plane, between = pointer(y) + outputs(kernel) * feature, pool.windows.plane * feature
        for k in 0:(pool.windows.input[2] - 1)
            multiply_row!(plane + k * n * feature, between, pointer(x) + corners[r * kernel.rows + k + 1] * feature, feature, n,
                          convolution, width, layout)
        end
        for channel in 0:(channels(pool.windows) - 1)
            pool_row!(pointer(y) + (channel * pooled + r) * m * feature, plane + channel * between, pool, width)
        end
    end
    return y
end

multiply!(y::Matrix{Float32}, x::Matrix{Float32}, kernel::Union{Padding,Scaling}, ::Val{V}) where {V} =
    apply!(y, x, kernel, V * LANES)

"Of an array in which features are `width` values."
function apply!(y, x, (; input, outputs, rows, value)::Padding, width)
    n, done = first(input)::Int * width, 0
    GC.@preserve x y for (r, row) in enumerate(rows)
        fill_places!(y, done + 1, row * width, value)
        from = pointer(x, (r - 1) * n + 1)
        store_row!(i -> vload(Lane, from + i * sizeof(Float32)), pointer(y, row * width + 1), n)
        done = row * width + n
    end
    fill_places!(y, done + 1, outputs * width, value)
    return y
end

function fill_places!(y, start, stop, value)
    @inbounds @simd for i in start:stop
        y[i] = value
    end
end

"A row of `n` values, LANES at a time; what then is written behind it is written over, or of no account."
@inline function store_row!(values, to, n)
    for i in 0:LANES:(n - 1)
        vstore(values(i), to + i * sizeof(Float32))
    end
end

function apply!(y, x, (; features, scale, shift)::Scaling, width)
    channel = features ÷ length(scale) * width
    @inbounds for c in eachindex(scale, shift), i in ((c - 1) * channel + 1):(c * channel)
        y[i] = muladd(scale[c], x[i], shift[c])
    end
    return y
end
