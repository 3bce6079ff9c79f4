using Flux, PrunableFlux, Random, Test
using PrunableFlux: select

masks(model) = [copy(l.mask) for l in prunables(model)]
snapshot(model) = deepcopy(Flux.state(model))

@testset "exact counts, monotone masks, no revival: trial $trial" for trial in 1:40
    rng = Xoshiro(trial)
    model = mlp(rng, rand(rng, 1:30, rand(rng, 2:5))...)
    structure = rand(rng, (Global(), Layerwise()))
    criterion = rand(rng, (Magnitude(), RandomSaliency(seed = trial)))
    for s in sort(0.99rand(rng, 4))
        before, weights = masks(model), [copy(l.dense.weight) for l in prunables(model)]
        prune!(model, criterion; sparsity = s, structure)
        after = masks(model)
        if structure isa Global
            @test sum(count, after) == sum(length, after) - round(Int, s * sum(length, after))
        else
            @test all(m -> count(m) == length(m) - round(Int, s * length(m)), after)
        end
        @test all(((b, a),) -> all(b .>= a), zip(before, after))
        @test all(l -> all(iszero, l.dense.weight[.!l.mask]), prunables(model))
        @test all(((l, w),) -> l.dense.weight[l.mask] == w[l.mask], zip(prunables(model), weights))
        again = masks(prune!(model, criterion; sparsity = s, structure))
        @test again == after
    end
end

@testset "the lowest scores go" begin
    model = mlp(Xoshiro(1), 20, 15, 5)
    magnitudes = [abs.(l.dense.weight) for l in prunables(model)]
    prune!(model, Magnitude(); sparsity = 0.6)
    kept = vcat((s[m] for (s, m) in zip(magnitudes, masks(model)))...)
    gone = vcat((s[.!m] for (s, m) in zip(magnitudes, masks(model)))...)
    @test maximum(gone) < minimum(kept)
end

@testset "ties go by layer, output, input" begin
    model = Chain(PrunableDense(ones(Float32, 2, 3)), PrunableDense(ones(Float32, 2, 2)))
    prune!(model, Magnitude(); sparsity = 0.4)
    @test masks(model) == [Bool[0 0 0; 0 1 1], trues(2, 2)]
    prune!(model, Magnitude(); sparsity = 0.7)
    @test masks(model) == [falses(2, 3), Bool[0 1; 1 1]]
    signed = [Float32[0.0 -0.0; -0.0 0.0]]
    @test select(Global(), signed, [trues(2, 2)], 0.25) == [Bool[0 1; 1 1]]
    @test select(Global(), signed, [trues(2, 2)], 0.5) == [Bool[0 0; 1 1]]
end

"The rule, written as a sort of all: which of the kept units stay if `keep` do, by score, layer, output, input and place."
function sorted_out(scores, masks, keep)
    order = [(score[i], l, Tuple(i)) for (l, (score, mask)) in enumerate(zip(scores, masks)) for i in CartesianIndices(mask)
             if mask[i]]
    new = map(copy, masks)
    for (_, l, i) in first(sort!(order; by = t -> (t[1] + 0.0, t[2], t[3])), length(order) - keep)
        new[l][i...] = false
    end
    return new
end

@testset "as by sorting all scores: trial $trial" for trial in 1:120
    rng = Xoshiro(trial)
    T = rand(rng, (Float32, Float64, Float16, Int))
    largest, dims = rand(rng, ((12, 2), (300, 2), (12, 4)))
    sizes = [Tuple(rand(rng, 1:largest, dims)) for _ in 1:rand(rng, 1:3)]
    scores = map(sizes) do size
        kind = rand(rng, (:different, :few, :zeros, :alike, :infinite))
        T === Int || kind === :few ? T.(rand(rng, -2:2, size)) :
            kind === :different ? randn(rng, T, size) :
            kind === :zeros ? rand(rng, T[-0.0, 0.0, 1e-7, -1e-7], size) :
            kind === :alike ? T(1) .+ eps(T) .* rand(rng, 0:3000, size) : rand(rng, T[-Inf, Inf, 1, 2], size)
    end
    masks = [rand(rng, Float32, size) .> 0.2 for size in sizes]
    n = sum(length, masks)
    s = max(n - sum(count, masks), rand(rng, 0:(n - 1))) / n
    before = deepcopy((scores, masks))
    @test select(Global(), scores, masks, s) == sorted_out(scores, masks, n - round(Int, s * n))
    @test (scores, masks) == before
    for (score, mask) in zip(scores, masks)
        s = max(count(!, mask), rand(rng, 0:length(mask))) / length(mask)
        s < 1 && @test select(Layerwise(), [score], [mask], s) == sorted_out([score], [mask], length(mask) - round(Int, s * length(mask)))
    end
end

@testset "all weights but those of a few rows are alike" begin
    score = [Float64(i > 70 && j > 3) for i in 1:80, j in 1:90]
    for k in (1, 89, 90, 91, 6300, 6301, 6300 + 31, 7000)
        @test select(Global(), [score], [trues(80, 90)], k / 7200) == sorted_out([score], [trues(80, 90)], 7200 - k)
    end
end

@testset "scores of what is pruned already do not count, even if NaN" begin
    scores, masks = [Float32[NaN 3; 1 2]], [Bool[0 1; 1 1]]
    @test select(Global(), scores, masks, 0.5) == [Bool[0 1; 0 1]]
    @test_throws ArgumentError select(Global(), scores, [trues(2, 2)], 0.5)
    @test select(Global(exclude = 1), [scores; [ones(1, 2)]], [trues(2, 2), trues(1, 2)], 0.5) == [trues(2, 2), Bool[0 1]]
end

@testset "selection needs no memory for each weight" begin
    scores, masks = [rand(Xoshiro(1), Float32, 500, 400)], [fill(true, 500, 400)]
    allocated() = @allocated PrunableFlux.drop_lowest!(masks, scores, 50_000)
    allocated()
    @test allocated() < 200_000
end

@testset "one sparsity per layer" begin
    model = mlp(Xoshiro(2), 10, 10, 10)
    prune!(model, Magnitude(); sparsity = [0.2, 0.75], structure = Layerwise())
    @test count.(masks(model)) == [80, 25]
    @test sparsity(model) ≈ 0.475
    @test density(model[1]) == 0.8
end

@testset "round half to even" begin
    @test count(only(select(Global(), [rand(1, 5)], [trues(1, 5)], 0.5))) == 3
    @test count(only(select(Global(), [rand(1, 7)], [trues(1, 7)], 0.5))) == 3
end

struct Broken
    scores::Any
end
PrunableFlux.saliency(criterion::Broken, model, batch...) = criterion.scores

@testset "bad input changes nothing" begin
    model = mlp(Xoshiro(3), 6, 5, 4)
    prune!(model, Magnitude(); sparsity = 0.3)
    before = snapshot(model)
    for (criterion, sparsity, structure, error) in (
            (Magnitude(), 1.0, Global(), ArgumentError), (Magnitude(), -0.1, Global(), ArgumentError),
            (Magnitude(), NaN, Global(), ArgumentError), (Magnitude(), 0.2, Global(), ArgumentError),
            (Magnitude(), [0.5, 0.5], Global(), DimensionMismatch), (Magnitude(), [0.5], Layerwise(), DimensionMismatch),
            (Magnitude(), [0.9, 0.0], Layerwise(), ArgumentError),
            (Magnitude(), "0.5", Global(), ArgumentError), (Magnitude(), 0.5, Global(min_kept = -3), ArgumentError),
            (Broken([fill(NaN, 5, 6), ones(4, 5)]), 0.5, Global(), ArgumentError),
            (Broken([ones(6, 5), ones(4, 5)]), 0.5, Global(), DimensionMismatch))
        @test_throws error prune!(model, criterion; sparsity, structure)
        @test snapshot(model) == before
    end
    @test_throws ArgumentError prune!(Chain(Dense(2 => 2)), Magnitude(); sparsity = 0.5)
    x, y = randn(Xoshiro(1), Float32, 6, 20), Flux.onehotbatch(rand(Xoshiro(1), 1:4, 20), 1:4)
    for data in ((Flux.DataLoader((x, y)),), (x,), (x, y), ((x, y), (x, y)))
        @test_throws "data must be one pair (x, y)" prune!(model, Taylor(), data...; sparsity = 0.5)
    end
    @test_throws "opt must be" prune!(model, Magnitude(); sparsity = 0.5, opt = Flux.setup(Adam(), unprunable(model)))
    @test_throws "labels must be (classes, n)" prune!(model, SNIP(), (x, rand(4, 2, 20)); sparsity = 0.5)
    @test snapshot(model) == before
    W = randn(Float32, 6, 6)
    shared = prunable(Chain(Dense(W, zeros(Float32, 6)), Dense(W, ones(Float32, 6)), Dense(6 => 3)))
    @test_throws "a weight in two layers, as in the 1st and the 2nd" prune!(shared, Magnitude(); sparsity = 0.5)
    @test all(layer -> all(layer.mask), prunables(shared))
end

struct Partly{A,B}
    a::A
    b::B
end
Flux.@layer Partly trainable=(a,)

@testset "prunable layers that are not trained" begin
    model = prunable(Chain(Partly(Dense(6 => 3), Dense(6 => 3))))
    opt = Flux.setup(Adam(), model)
    @test sparsity(prune!(model, Magnitude(); sparsity = 0.5, opt)) == 0.5
end

@testset "sparsities in any precision" begin
    for s in (Float16(0.5), 0.5f0, 1 // 2)
        @test sparsity(prune!(Chain(PrunableDense(300 => 300)), Magnitude(); sparsity = s)) == 0.5
    end
end
