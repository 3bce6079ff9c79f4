"""
    saliency(criterion, model, batch...) -> Vector of score arrays

How much each prunable weight matters: one array per layer of [`prunables`](@ref)`(model)`, of the size of
its weight, in which higher is more important. `batch` is an `(x, y)` that criteria which need data use.

A new criterion is a struct and a method of this function; masks, schedules and training are not its concern.
"""
function saliency end

"""
    Magnitude()

Score `|w|` (Janowsky 1989; Han, Pool, Tran & Dally 2015, arXiv:1506.02626).
"""
struct Magnitude end

saliency(::Magnitude, model, batch...) = [abs.(layer.dense.weight) for layer in prunables(model)]

"""
    RandomSaliency(; seed = 0)

Score uniform on [0, 1): the baseline. The scores depend on nothing but the seed and the layers' sizes, so
that successive rounds follow one random order.
"""
Base.@kwdef struct RandomSaliency
    seed::Int = 0
end

function saliency(criterion::RandomSaliency, model, batch...)
    rng = Xoshiro(criterion.seed)
    return [rand(rng, Float32, size(layer.mask)) for layer in prunables(model)]
end
