# Features of a panel are in the order of Flux's arrays, the first dimension fastest. So what lies under a window is at the
# same distances from its corner wherever that is, and the outputs of windows next to each other are next to each other: they
# are computed together, as many as registers hold.

"""
    Windows(input, size, stride, dilation)

The places of windows of `size` in an input of size `(places..., channels)`, which is padded already.
"""
struct Windows
    input::Dims
    output::Dims # without channels
    rows::Vector{Int} # the corner of the first window of each row, as its distance from the first feature
    step::Int # from one corner to the next one of the row
    taps::Vector{Int} # distances from the corner, of one channel
end

function Windows(input, size, stride, dilation)
    places = Base.front(input)
    output = @. (places - dilation * (size - 1) - 1) ÷ stride + 1
    all(>(0), output) || throw(DimensionMismatch("windows of size $size do not fit into $places places"))
    distances = cumprod((1, Base.front(places)...))
    at(place, steps) = sum((Tuple(place) .- 1) .* steps .* distances)
    rows = vec([at(place, stride) for place in CartesianIndices((1, Base.tail(output)...))])
    return Windows(input, output, rows, first(stride), vec([at(place, dilation) for place in CartesianIndices(size)]))
end

"Of a layer whose outputs depend on all inputs: one window, and each input a channel."
Windows(inputs::Int) = Windows((1, inputs), (1,), (1,), (1,))

channels(windows)::Int = last(windows.input)
row_length(windows)::Int = first(windows.output)
plane(windows)::Int = prod(Base.front(windows.input)) # the features of a channel
"The distances of everything under a window from its corner, channel by channel."
taps(windows) = vec([tap + channel * plane(windows) for tap in windows.taps, channel in 0:(channels(windows) - 1)])

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

"The kept weights of a convolution, output by output."
struct SparseWindows
    windows::Windows
    relu::Bool
    bias::Vector{Float32}
    pointers::Vector{Int} # where the weights of each output begin, and the end
    taps::Vector{Int32} # of each weight
    weights::Vector{Float32}
end

function SparseWindows(windows, W, mask, bias, relu)
    rows = SparseRows(W, mask, bias, relu)
    return SparseWindows(windows, relu, bias, rows.pointers, taps(windows)[rows.indices], rows.weights)
end

"The largest or the mean value under each window, channel by channel."
struct Pooling
    windows::Windows
    mean::Bool
end

"Values around rows of an input of size `(places..., channels)`."
struct Padding
    input::Dims
    output::Dims
    rows::Vector{Int} # where each goes, as its distance from the first feature
    value::Float32
end

function Padding(input::Dims, output::Dims, before::Dims, value)
    places = LinearIndices(output)
    rows = vec([places[place + CartesianIndex(before)] - 1 for place in CartesianIndices((1, Base.tail(input)...))])
    return Padding(input, output, rows, value)
end

"What batch normalisation does: values times `scale` plus `shift`, each for as many features as a channel has."
struct Scaling
    features::Int
    scale::Vector{Float32}
    shift::Vector{Float32}
end

inputs(kernel)::Int = prod(kernel.windows.input)
outputs(kernel)::Int = prod(kernel.windows.output) * length(kernel.bias)
outputs(pool::Pooling)::Int = prod(pool.windows.output) * channels(pool.windows)
inputs(padding::Padding)::Int = prod(padding.input)
outputs(padding::Padding)::Int = prod(padding.output)
inputs(scaling::Scaling) = scaling.features
outputs(scaling::Scaling) = scaling.features

"How many vectors of sums a kernel has for each output."
vectors(::DenseKernel) = MAX_VECTORS
vectors(::SparseWindows) = GROUP > 1 ? 2MAX_VECTORS : MAX_VECTORS

"How many outputs a kernel computes at once, and how many such groups it has."
group_size(::DenseKernel) = GROUP
group_size(::SparseWindows) = 1
groups(kernel) = cld(length(kernel.bias), group_size(kernel))

function multiply!(y::Matrix{Float32}, x::Matrix{Float32}, kernel::Union{DenseKernel,SparseWindows}, ::Val{V}) where {V}
    (; rows, step) = kernel.windows
    feature, n = V * sizeof(Lane), row_length(kernel.windows)
    plane = n * length(rows) * feature
    GC.@preserve x y kernel for (r, corner) in enumerate(rows), g in 1:groups(kernel)
        from, to = pointer(x) + corner * feature, pointer(y) + (g - 1) * group_size(kernel) * plane + (r - 1) * n * feature
        if step == 1
            multiply_row!(to, plane, from, n, kernel, g, Val(V * sizeof(Lane)), Val(V), Val(vectors(kernel) ÷ V))
        else
            for i in 0:(n - 1)
                multiply_places!(to + i * feature, plane, from + i * step * feature, kernel, g, Val(V * sizeof(Lane)), Val(V))
            end
        end
    end
    return y
end

"""
The outputs of the `g`-th group at `n` places, of V vectors each, next to each other, P of them at a time and those left over by
fewer. Features are F bytes apart.
"""
function multiply_row!(y, plane, x, n, kernel, g, distance::Val{F}, ::Val{V}, ::Val{P}) where {F,V,P}
    done = 0
    while done + P <= n
        multiply_places!(y + done * V * sizeof(Lane), plane, x + done * V * sizeof(Lane), kernel, g, distance, Val(V * P))
        done += P
    end
    P > 1 && done < n && multiply_row!(y + done * V * sizeof(Lane), plane, x + done * V * sizeof(Lane), n - done, kernel, g,
                                       distance, Val(V), Val(P ÷ 2))
    return nothing
end

function multiply_places!(y, plane, x, kernel::SparseWindows, o, ::Val{F}, ::Val{N}) where {F,N}
    taps, weights = pointer(kernel.taps), pointer(kernel.weights)
    sums = ntuple(_ -> Lane(@inbounds kernel.bias[o]), Val(N))
    for k in @inbounds kernel.pointers[o]:(kernel.pointers[o + 1] - 1)
        sums = add_product(sums, Lane(unsafe_load(weights, k)), x + (unsafe_load(taps, k) % Int) * F)
    end
    return store!(y, kernel.relu ? map(s -> max(s, zero(s)), sums) : sums, Val(N))
end

function multiply_places!(y, plane, x, kernel::DenseKernel, g, ::Val{F}, ::Val{N}) where {F,N}
    n, taps = length(kernel.taps), pointer(kernel.taps)
    weights = pointer(kernel.packed) + (g - 1) * GROUP * n * sizeof(Float32)
    sums = ntuple(_ -> ntuple(_ -> zero(Lane), Val(N)), Val(GROUP))
    for k in 1:n
        sums = add_row(sums, load(x + unsafe_load(taps, k) * F, Val(N)), weights + (k - 1) * GROUP * sizeof(Float32))
    end
    for i in 1:outputs_of_group(kernel, g)
        b = @inbounds kernel.bias[(g - 1) * GROUP + i]
        row = map(s -> kernel.relu ? max(s + b, zero(s)) : s + b, sums[i])
        store!(y + (i - 1) * plane, row, Val(N))
    end
    return nothing
end

outputs_of_group(kernel, g) = min(group_size(kernel), length(kernel.bias) - (g - 1) * group_size(kernel))

@inline add_row(sums, input, weights) =
    ntuple(i -> (w = Lane(unsafe_load(weights, i)); map((s, x) -> muladd(w, x, s), sums[i], input)), Val(GROUP))

function multiply!(y::Matrix{Float32}, x::Matrix{Float32}, (; windows, mean)::Pooling, width::Val{V}) where {V}
    feature, to, n, distance = V * sizeof(Lane), pointer(y), row_length(windows), plane(windows)
    GC.@preserve x y for channel in 0:(channels(windows) - 1), corner in windows.rows
        from = pointer(x) + (channel * distance + corner) * feature
        for i in 0:(n - 1)
            under = from + i * windows.step * feature
            store!(to + i * feature, mean ? mean_of(under, windows.taps, width) : largest_of(under, windows.taps, width), width)
        end
        to += n * feature
    end
    return y
end

@inline mean_of(x, taps, width) = map(sum -> sum / Float32(length(taps)), reduced(+, x, taps, width))
@inline largest_of(x, taps, width) = reduced(max, x, taps, width)

@inline function reduced(f, x, taps, width::Val{V}) where {V}
    values = load(x, width)
    for t in 2:length(taps)
        values = map(f, values, load(x + (@inbounds taps[t]) * V * sizeof(Lane), width))
    end
    return values
end

multiply!(y::Matrix{Float32}, x::Matrix{Float32}, kernel::Union{Padding,Scaling}, ::Val{V}) where {V} =
    apply!(y, x, kernel, V * LANES)

"Of an array in which features are `width` values."
function apply!(y, x, padding::Padding, width)
    fill!(view(y, 1:(outputs(padding) * width)), padding.value)
    n = first(padding.input)::Int * width
    for (r, row) in enumerate(padding.rows)
        copyto!(y, row * width + 1, x, (r - 1) * n + 1, n)
    end
    return y
end

function apply!(y, x, (; features, scale, shift)::Scaling, width)
    channel = features ÷ length(scale) * width
    @inbounds for c in eachindex(scale, shift), i in ((c - 1) * channel + 1):(c * channel)
        y[i] = muladd(scale[c], x[i], shift[c])
    end
    return y
end
